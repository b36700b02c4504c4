"""S4D in a training loop of one's own: scikit-learn's 8 x 8 digits, read as sequences of 64 pixels.

    python examples/own_loop.py            # about half a minute on an idle core; needs scikit-learn

Steps, A and B of the state spaces want a learning rate of their own and no weight decay; `parameter_groups` reads from
every mixer which parameters those are.
"""

import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anymixer import S4D
from anymixer.training.optimizers import parameter_groups


class DigitClassifier(nn.Module):
    """[batch, 64] pixels -> [batch, 10] logits: layers of norm and S4D, added to a stream; its mean over pixels."""

    def __init__(self, width: int = 64, depth: int = 3, d_state: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(S4D(width, d_state=d_state, dt_min=0.01) for _ in range(depth))
        self.dropout = nn.Dropout(0.1)
        self.decoder = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.encoder(pixels[..., None])
        for norm, mixer in zip(self.norms, self.mixers):
            hidden = hidden + self.dropout(mixer(norm(hidden)))
        return self.decoder(hidden.mean(dim=1))


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, of mean 0 and variance 1, and their labels; every fifth image is for testing."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split((images - 4.9) / 6.0, labels, test_size=0.2, stratify=labels, random_state=0)
    x, x_test, y, y_test = (torch.tensor(part) for part in split)
    return x.float(), x_test.float(), y, y_test


def train(epochs: int = 20, batch_size: int = 64, lr: float = 4e-3, **model_options: int) -> float:
    """Train, print an epoch a line, and return the accuracy on the test images."""
    torch.manual_seed(0)
    x, x_test, y, y_test = load_data()
    model = DigitClassifier(**model_options)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=lr)
    steps = epochs * (len(x) // batch_size)
    warmup_then_cosine = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.15
    )
    start, accuracy = time.time(), 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(x))[: len(x) // batch_size * batch_size].split(batch_size):
            loss = cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup_then_cosine.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x_test).argmax(-1) == y_test).float().mean().item()
        print(f"epoch {epoch:2}  loss {loss.item():.3f}  test accuracy {accuracy:.2%}  {time.time() - start:.0f} s")
    return accuracy


if __name__ == "__main__":
    parameters = sum(p.numel() for p in DigitClassifier().parameters())
    print(f"{parameters:,} parameters")
    train()
