"""The classifier: pooling, padding, packing, regression, initial values, and transformers' own BERT beside it."""

import pytest
import torch

from anymixer.errors import UserError
from anymixer.models import MixerBertForSequenceClassification, ModelConfig, build_classifier
from anymixer.models.sequence_classification import classification_loss

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
HF_SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXERS = [{"name": "hydra", "d_state": 8}, {"name": "attention", "num_heads": 4}]


def classifier(mixer=MIXERS[0], labels=3, pooling="cls"):
    torch.manual_seed(0)
    model = build_classifier(ModelConfig(mixer=mixer, model_config=SMALL), labels, pooling=pooling).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 96, (1, length), generator=generator) for length in (11, 6, 4)]


def padded(rows):
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.randint(5, 96, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : row.shape[1]], mask[i, : row.shape[1]] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_neither_padding_nor_neighbours_change_a_text_s_logits(mixer, pooling):
    model, rows = classifier(mixer, pooling=pooling), texts()
    alone = torch.cat([model(input_ids=row).logits for row in rows])
    torch.testing.assert_close(model(**padded(rows)).logits, alone, rtol=1e-4, atol=1e-5)
    ids = torch.cat([rows[0], rows[1], torch.zeros(1, 3, dtype=torch.long)], 1)
    second = torch.cat([rows[2], torch.zeros(1, 16, dtype=torch.long)], 1)
    sequence = torch.tensor([[0] * 11 + [1] * 6 + [-1] * 3, [0] * 4 + [-1] * 16])
    batch = {"input_ids": torch.cat([ids, second]), "sequence_id": sequence, "attention_mask": (sequence >= 0).long()}
    labels = torch.tensor([[0, 2], [1, -100]])
    packed = model(**batch, labels=labels)
    assert packed.logits.shape == (2, 2, 3)
    torch.testing.assert_close(packed.logits[[0, 0, 1], [0, 1, 0]], alone, rtol=1e-4, atol=1e-5)
    apart = model(**padded(rows), labels=torch.tensor([0, 2, 1])).loss
    torch.testing.assert_close(packed.loss, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_is_what_it_says(pooling):
    model, row = classifier(pooling=pooling), texts()[0]
    states = model.bert(row).last_hidden_state[0]
    pooled = states[0] if pooling == "cls" else states.mean(0)
    hidden = torch.tanh(model.pooler.dense.weight @ pooled + model.pooler.dense.bias)
    expected = model.classifier.weight @ hidden + model.classifier.bias
    torch.testing.assert_close(model(input_ids=row).logits[0], expected)


def test_one_label_is_regression_by_squared_error():
    model, rows = classifier(labels=1), texts()
    targets = torch.tensor([0.5, 4.0, 2.5])
    output = model(**padded(rows), labels=targets)
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - targets) ** 2).mean())


def test_the_classes_loss_is_cross_entropy():
    model, rows = classifier(), texts()
    output = model(**padded(rows), labels=torch.tensor([2, 0, 1]))
    expected = -output.logits.log_softmax(-1)[[0, 1, 2], [2, 0, 1]].mean()
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("absent", [-100, float("nan")])
def test_absent_sequences_count_neither_in_the_loss_nor_in_its_gradient(absent):
    """Classes, then regression: as without them."""
    labels = torch.tensor([[1, absent, 2], [0, absent, absent]])
    logits = torch.randn(2, 3, 1 if labels.is_floating_point() else 3, requires_grad=True)
    here = torch.tensor([[True, False, True], [True, False, False]])
    loss = classification_loss(logits, labels)
    if labels.is_floating_point():
        expected = (logits[here][:, 0] - labels[here]).square().mean()
    else:
        expected = -logits[here].log_softmax(-1)[range(3), labels[here]].mean()
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert (ours[~here] == 0).all()


def test_the_head_is_drawn_as_bert_s_is():
    torch.manual_seed(0)
    config = ModelConfig(mixer="hydra", model_config=SMALL | {"hidden_size": 256})
    model = build_classifier(config, 3)
    assert model.pooler.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.classifier.bias.any() and not model.pooler.dense.bias.any()


def test_dropout_before_the_classifier():
    config = ModelConfig(mixer="hydra", model_config=SMALL | {"hidden_dropout_prob": 0.3})
    assert build_classifier(config, 2).dropout.p == 0.3
    assert build_classifier(config, 2, classifier_dropout=0.1).dropout.p == 0.1


def test_a_saved_classifier_keeps_its_pooling(tmp_path):
    model, rows = classifier(pooling="mean"), texts()
    model.save_pretrained(tmp_path)
    again = MixerBertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**padded(rows[:1])).logits, model(**padded(rows[:1])).logits)


def test_hf_bert_is_transformers_own():
    model = build_classifier(ModelConfig(name="hf_bert", model_config=HF_SMALL), 1)
    assert type(model).__name__ == "BertForSequenceClassification"
    targets = torch.tensor([0.5, 4.0, 2.5])
    output = model.eval()(**padded(texts()), labels=targets)
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - targets) ** 2).mean())


@pytest.mark.parametrize(
    ("config", "pooling", "message"),
    [
        (ModelConfig(mixer="hydra", model_config=SMALL), "max", "pooling: 'max' is none of cls, mean"),
        (ModelConfig(name="hf_bert", model_config=HF_SMALL), "mean", "pooling: hf_bert pools cls alone"),
    ],
)
def test_mistakes_are_named(config, pooling, message):
    with pytest.raises(UserError, match=message):
        build_classifier(config, 2, pooling=pooling)
