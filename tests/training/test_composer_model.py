from types import SimpleNamespace

import pytest
import torch
from transformers import BertTokenizerFast

from anymixer.errors import UserError
from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM
from anymixer.training.composer_model import MixerComposerModel, masked_rows, matrix_weights


def batch_of(tiny_run, rows: range) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([tiny_run.sample(index) for index in rows])


@pytest.fixture
def model(tiny_run) -> MixerComposerModel:
    return MixerComposerModel(tiny_run.model(dropout=0.0)).eval()


def test_the_tokenizer_and_the_config_go_into_every_checkpoint(tiny_run, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mix", "er"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    metadata = MixerComposerModel(tiny_run.model(), tokenizer).get_metadata()
    assert metadata["model"]["config"]["content"]["vocab_size"] == tiny_run.VOCAB
    assert set(metadata["tokenizer"]["tokenizer.json"]["content"]["model"]["vocab"]) == set(words)


def test_masked_rows_are_the_same_from_either_shape_of_logits():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[-100, 1, 2], [3, -100, -100]])
    rows, targets = masked_rows(logits, labels)
    assert targets.tolist() == [1, 2, 3]
    assert torch.equal(rows, logits[[0, 0, 1], [1, 2, 0]])
    again, found = masked_rows(rows, labels)
    assert torch.equal(again, rows) and torch.equal(found, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_metrics_of_training_do_not_wait_for_the_device(model):
    labels = torch.where(torch.rand(4, 32) < 0.3, torch.randint(64, (4, 32)), -100).cuda()
    outputs = SimpleNamespace(logits=torch.randn(int((labels != -100).sum()), 64, device="cuda"))
    metrics = [metric.cuda() for metric in model.get_metrics(is_train=True).values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for metric in metrics:
            model.update_metric({"labels": labels}, outputs, metric)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    accuracy = (outputs.logits.argmax(-1) == labels[labels != -100]).float().mean()
    assert metrics[1].compute() == accuracy


def test_metrics_are_means_over_all_masked_rows(tiny_run, model):
    """Batches of unlike numbers of masked rows weigh by those, not one each."""
    batches = [batch_of(tiny_run, rows) for rows in (range(3), range(3, 4), range(4, 11))]
    metrics = model.get_metrics()
    assert set(metrics) == {"LanguageCrossEntropy", "MaskedAccuracy"}
    losses, hits = [], []
    with torch.no_grad():
        for batch in batches:
            outputs = model.eval_forward(batch)
            for metric in metrics.values():
                model.update_metric(batch, outputs, metric)
            logits, targets = masked_rows(outputs.logits, batch["labels"])
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            hits.append(logits.argmax(-1) == targets)
    assert metrics["LanguageCrossEntropy"].compute().item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-6)
    assert metrics["MaskedAccuracy"].compute().item() == pytest.approx(torch.cat(hits).float().mean().item())


def test_metrics_take_logits_of_the_masked_rows_alone(tiny_run, model):
    batch = batch_of(tiny_run, range(4))
    with torch.no_grad():
        outputs = model.eval_forward(batch)
    gathered = SimpleNamespace(logits=masked_rows(outputs.logits, batch["labels"])[0], loss=outputs.loss)
    for name in ("LanguageCrossEntropy", "MaskedAccuracy"):
        both = [model.get_metrics(is_train=True)[name] for _ in range(2)]
        model.update_metric(batch, outputs, both[0])
        model.update_metric(batch, gathered, both[1])
        assert torch.equal(both[0].compute(), both[1].compute())


def test_a_batch_without_masked_rows_adds_nothing(tiny_run, model):
    batch = batch_of(tiny_run, range(2))
    metric = model.get_metrics(is_train=False)["LanguageCrossEntropy"]
    with torch.no_grad():
        model.update_metric(batch, model.eval_forward(batch), metric)
        before = metric.compute()
        batch["labels"][:] = -100
        model.update_metric(batch, model.eval_forward(batch), metric)
    assert torch.equal(metric.compute(), before)


def test_the_loss_is_the_metric(tiny_run, model):
    batch = batch_of(tiny_run, range(4))
    outputs = model(batch)
    metric = model.get_metrics(is_train=True)["LanguageCrossEntropy"]
    model.update_metric(batch, outputs, metric)
    assert model.loss(outputs, batch).item() == pytest.approx(metric.compute().item(), rel=1e-6)


def test_flops_count_matrices_once_and_the_vocabulary_only_where_predicted(tiny_run, model):
    hidden, inner, layers = 16, 32, 2
    body = layers * (4 * hidden**2 + 2 * hidden * inner) + hidden**2
    assert matrix_weights(model.model) == (body, hidden * tiny_run.VOCAB)
    batch = batch_of(tiny_run, range(4))
    predicted = int((batch["labels"] != -100).sum())
    expected = 6 * (body * 4 * tiny_run.LENGTH + hidden * tiny_run.VOCAB * predicted)
    assert model.flops_per_batch(batch) == expected


def test_flops_count_the_experts_that_a_position_chooses():
    shared = {"name": "glu", "intermediate_size": 32, "down_bias": False}
    experts = {"num_experts": 400, "num_heads": 2, "experts_per_head": 3, "retrieval_dim": 8}
    mixer, size = {"name": "attention", "num_heads": 2}, {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
    plain, mixture = (
        matrix_weights(MixerLMForCausalLM(MixerLMConfig(mixer=mixer, channel_mixer=channel, **size)))[0]
        for channel in (shared, {"name": "cdmoe", "intermediate_size": 32, **experts})
    )
    queries, keys, chosen = 16 * 2 * 8, 2 * 2 * 20 * 4, 2 * 3 * (16 + 16)
    assert mixture - plain == 2 * (queries + keys + chosen)


def test_packed_rows_need_a_model_that_keeps_them_apart(tiny_run, model):
    batch = batch_of(tiny_run, range(2))
    with pytest.raises(UserError, match=r"^train_loader.dataset: packed rows"):
        model(batch | {"sequence_id": torch.zeros_like(batch["input_ids"])})


def test_layers_are_the_units_of_sharding(model):
    shard = model.model.fsdp_wrap_fn
    units = [name for name, module in model.model.named_modules() if shard(module)]
    assert units == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
