"""Cross Domain Mixture of Experts (arXiv 2412.11834): a shared gated MLP and many private experts of one neuron each,
found by product keys (arXiv 1907.05242, 2407.04153). Every token is routed by itself alone."""

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anymixer.errors import UserError
from anymixer.layers.channel_mixer_base import ACTIVATIONS, Activation, ChannelMixer, channel_mixers

# Numbers of gathered expert weights worked on at once: 64 MiB in float32.
_GATHERED = 2**24


def candidate_pairs(keep: int, keys: int) -> tuple[list[int], list[int]]:
    """Which pairs of places, in two descending lists of at most `keys`, can be among the `keep` greatest sums: of
    those before (i, j) in both there are (i + 1)(j + 1), itself included."""
    pairs = [(i, j) for i in range(min(keep, keys)) for j in range(min(keep // (i + 1), keys))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def retrieve(first: Tensor, second: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` greatest first[..., i] + second[..., j], exactly, without forming all sums.

    first, second: [..., keys]. Returns sums [..., keep], descending, and indices i * keys + j.
    """
    keys = first.shape[-1]
    top = min(keep, keys)
    (first, i), (second, j) = first.topk(top, dim=-1), second.topk(top, dim=-1)
    rows, columns = candidate_pairs(keep, keys)
    sums, best = (first[..., rows] + second[..., columns]).topk(keep, dim=-1)
    return sums, (i[..., rows] * keys + j[..., columns]).gather(-1, best)


class CrossDomainExperts(ChannelMixer):
    """down(activation(gate(x)) * up(x)), and for each of a token's experts e: w_e activation(x . D_e) U_e, w their
    softmax."""

    balance_loss: Tensor | None = None
    _balance_has_gradient = False

    @dataclass(kw_only=True)
    class Config(ChannelMixer.Config):
        """intermediate_size: of the shared MLP. num_experts: a square number. num_heads: independent choices a token
        makes; experts_per_head: experts of each. retrieval_dim: width of a head's query, half for either key.
        load_balancing: weight of `balance_loss`, 0 for none."""

        activation: Activation = "silu"
        bias: bool = False
        num_experts: int = 16384
        num_heads: int = 4
        experts_per_head: int = 8
        retrieval_dim: int = 64
        load_balancing: float = 0.0

        def __post_init__(self) -> None:
            _validate(self)

    def __init__(self, d_model: int, config: Any) -> None:
        super().__init__(d_model, config)
        self.config, self.num_keys = config, isqrt(config.num_experts)
        self.gate_up = nn.Linear(d_model, 2 * config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, d_model, bias=config.bias)
        self.query = nn.Linear(d_model, config.num_heads * config.retrieval_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(config.num_heads, 2, self.num_keys, config.retrieval_dim // 2))
        self.expert_down = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.expert_up = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Experts as the published code draws them; keys not as there at 0, which sends every token to the same
        experts and no gradient to the queries."""
        self.keys.normal_(std=self.keys.shape[-1] ** -0.5)
        self.expert_down.normal_(std=0.02)
        self.expert_up.normal_(std=0.02)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d_model] -> the same shape."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up) + self._private(hidden_states)

    def _private(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        weights, experts = self.route(tokens)
        down, up = (t.to(tokens.dtype) for t in (self.expert_down, self.expert_up))
        strength = self.activation(_scores(tokens, experts, down)) * weights.to(tokens.dtype)
        # Sums rows of `up` without a copy of those that are chosen.
        mixed = F.embedding_bag(experts, up, per_sample_weights=strength, mode="sum")
        return mixed.view_as(hidden_states)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts: tokens [n, d_model] -> weights and indices, [n, num_heads * experts_per_head]."""
        config = self.config
        queries = self.query(tokens).view(len(tokens), config.num_heads, 2, -1)
        wide = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = torch.einsum("nhsr,hskr->shnk", queries.to(wide), self.keys.to(wide))
            sums, experts = retrieve(logits[0], logits[1], config.experts_per_head)
            if self.training and config.load_balancing:
                self._keep_balance_loss(config.load_balancing * _imbalance(logits, experts))
            weights = sums.softmax(dim=-1)
        return weights.transpose(0, 1).flatten(1), experts.transpose(0, 1).flatten(1)

    def _keep_balance_loss(self, loss: Tensor) -> None:
        """A checkpointed layer runs again in the backward pass, when the loss has been taken: kept once more, it would
        hold all that the layer has computed again. If it ran without gradients before, the loss has had none."""
        # As torch.utils.checkpoint itself tells; what is compiled is traced forwards.
        forward = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        if forward:
            self.balance_loss, self._balance_has_gradient = loss, loss.requires_grad
        elif loss.requires_grad and not self._balance_has_gradient:
            raise UserError(
                "load_balancing: gradient checkpointing with use_reentrant=True drops its gradient; take "
                "use_reentrant=False"
            )

    def idle_weights(self) -> int:
        """How many numbers of the experts' matrices a token does not multiply."""
        chosen = self.config.num_heads * self.config.experts_per_head
        return (self.config.num_experts - chosen) * (self.expert_down.shape[1] + self.expert_up.shape[1])


def with_balance_losses(model: nn.Module, loss: Tensor) -> Tensor:
    """loss, and in training what `take_balance_losses` gives."""
    balance = take_balance_losses(model) if model.training else None
    return loss if balance is None else loss + balance


def take_balance_losses(model: nn.Module) -> Tensor | None:
    """What the last forward pass in training adds to the loss so that experts are used alike: the sum over all
    layers, or None where none asks for it (`load_balancing`). They are forgotten, so that no graph stays behind."""
    losses = []
    for module in model.modules():
        if isinstance(module, CrossDomainExperts) and module.balance_loss is not None:
            losses.append(module.balance_loss)
            module.balance_loss = None
    return torch.stack(losses).sum() if losses else None


def _imbalance(logits: Tensor, experts: Tensor) -> Tensor:
    """keys * sum over keys of (share of the choices) * (mean probability), of both halves and all heads: 1 when all
    are alike (Switch Transformer, arXiv 2101.03961, equation 4; of the keys, as a table of experts by tokens would be
    their square). logits: [2, heads, n, keys]; experts: [heads, n, experts_per_head]."""
    keys = logits.shape[-1]
    halves = torch.stack([experts // keys, experts % keys]).flatten(2)
    shares = torch.zeros_like(logits[:, :, 0]).scatter_add(-1, halves, torch.ones_like(halves, dtype=logits.dtype))
    return keys * (shares / halves.shape[-1] * logits.softmax(dim=-1).mean(dim=2)).sum(dim=-1).mean()


def _scores(tokens: Tensor, experts: Tensor, down: Tensor) -> Tensor:
    """x . D_e for each token's experts: [n, d_model], [n, chosen] -> [n, chosen]. The gathered rows of `down`, chosen
    times the size of the tokens, are made in pieces and again in the backward pass."""
    rows = max(1, _GATHERED // (experts.shape[1] * tokens.shape[1]))
    products: list[Tensor] = []
    for piece, chosen in zip(tokens.split(rows), experts.split(rows)):
        product: Any = checkpoint(_gathered_product, piece, chosen, down, use_reentrant=False, preserve_rng_state=False)
        products.append(product)
    return torch.cat(products)


def _gathered_product(tokens: Tensor, experts: Tensor, down: Tensor) -> Tensor:
    return (F.embedding(experts, down) @ tokens[..., None])[..., 0]


def _validate(config: Any) -> None:
    path = "channel_mixer"
    for key in ("num_experts", "num_heads", "experts_per_head"):
        if getattr(config, key) < 1:
            raise UserError(f"{path}.{key}: {getattr(config, key)} is below 1")
    side = isqrt(config.num_experts)
    if side * side != config.num_experts:
        raise UserError(
            f"{path}.num_experts: {config.num_experts} is no square number, as two halves of a key need; "
            f"take {side**2} or {(side + 1) ** 2}"
        )
    if config.experts_per_head > config.num_experts:
        raise UserError(f"{path}.experts_per_head: {config.experts_per_head} is more than num_experts")
    if config.retrieval_dim < 2 or config.retrieval_dim % 2:
        raise UserError(f"{path}.retrieval_dim: {config.retrieval_dim} is not an even number above 0")
    if config.load_balancing < 0:
        raise UserError(f"{path}.load_balancing: {config.load_balancing} is below 0")


channel_mixers.register("cdmoe")(CrossDomainExperts)


class CDMoE(CrossDomainExperts):
    """The module by its published arguments: CDMoE(d_model=64, act_fn="silu", d_ff=256, ...)(x)."""

    def __init__(
        self,
        d_model: int,
        act_fn: Activation,
        d_ff: int,
        d_private_expert_retrieval: int,
        n_experts: int,
        n_experts_heads: int,
        n_experts_per_head: int,
        load_balancing: float = 0.0,
    ) -> None:
        """act_fn: silu, gelu or relu; d_ff: width of the shared MLP. Raises UserError for what does not fit."""
        if act_fn not in ACTIVATIONS:
            raise UserError(f"act_fn: '{act_fn}' is none of {', '.join(ACTIVATIONS)}")
        config = self.Config(
            intermediate_size=d_ff,
            activation=act_fn,
            num_experts=n_experts,
            num_heads=n_experts_heads,
            experts_per_head=n_experts_per_head,
            retrieval_dim=d_private_expert_retrieval,
            load_balancing=load_balancing,
        )
        super().__init__(d_model, config)
