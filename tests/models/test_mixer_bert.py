"""The encoder: parameter counts, the reference's logits, padding, masked-only loss, initial values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from anymixer.checkpoints.published_hydra import convert_config, convert_weights
from anymixer.errors import UserError
from anymixer.models import MixerBertConfig, MixerBertForMaskedLM, ModelConfig, build_model

GOLDENS = Path(__file__).parents[1] / "goldens"
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
MIXERS = [
    {"name": "hydra", "d_state": 8},
    {"name": "attention", "num_heads": 4},
    {"name": "attention", "num_heads": 4, "positions": "alibi"},
]


def small_model(mixer=MIXERS[0], **architecture):
    torch.manual_seed(0)
    model = build_model(ModelConfig(mixer=mixer, model_config={**SMALL, **architecture})).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


def test_logits_match_the_reference_model():
    with safe_open(GOLDENS / "bert.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = convert_config(json.loads(file.metadata()["config"]))
    model = MixerBertForMaskedLM(config).eval()
    weights = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    model.load_state_dict(convert_weights(weights), strict=True)
    logits = model(input_ids=tensors["input_ids"]).logits
    assert (logits - tensors["logits"]).norm() / tensors["logits"].norm() < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    "architecture", [{}, {"prenorm": True, "channel_mixer": "glu"}, {"position_embeddings": "learned"}]
)
def test_logits_do_not_depend_on_padding_or_neighbours(mixer, architecture):
    model = small_model(mixer, **architecture)
    first, second = torch.randint(5, 96, (1, 11)), torch.randint(5, 96, (1, 6))
    alone = model(input_ids=first).logits, model(input_ids=second).logits
    padded = model(
        input_ids=torch.cat([first, torch.randint(5, 96, (1, 9))], 1),
        attention_mask=torch.tensor([[1] * 11 + [0] * 9]),
    ).logits
    packed = model(
        input_ids=torch.cat([first, second, torch.zeros(1, 3, dtype=torch.long)], 1),
        sequence_id=torch.tensor([[0] * 11 + [1] * 6 + [-1] * 3]),
    ).logits
    torch.testing.assert_close(padded[:, :11], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, :11], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 11:17], alone[1], rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_labelled_tokens_alone():
    model = small_model()
    ids = torch.randint(5, 96, (3, 10))
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[2, 7] = 11, 12
    output = model(input_ids=ids, labels=labels)
    full = model(input_ids=ids).logits
    assert output.logits.shape == (2, 96)
    torch.testing.assert_close(output.logits, full[[0, 2], [2, 7]])
    expected = torch.nn.functional.cross_entropy(full[[0, 2], [2, 7]], torch.tensor([11, 12]))
    torch.testing.assert_close(output.loss, expected)


def test_nothing_of_batch_length_vocab_is_built_in_training():
    model = small_model().train()
    ids = torch.randint(5, 96, (4, 16))
    labels = torch.full_like(ids, -100)
    labels[:, 3] = 7
    largest = 0

    def note(_module, _inputs, output):
        nonlocal largest
        if isinstance(output, torch.Tensor) and output.shape[-1] == 96:
            largest = max(largest, output.numel())

    for module in model.modules():
        module.register_forward_hook(note)
    model(input_ids=ids, labels=labels).loss.backward()
    assert largest == 4 * 96


def test_what_follows_a_norm_gets_its_copy_in_autocasts_type_and_nothing_else_changes():
    model = small_model().train()
    ids = torch.randint(5, 96, (3, 8))
    read = []
    for layer in model.bert.backbone.layers:
        for residual in layer.residuals():
            residual.mixer.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].dtype))
    results = []
    for copies in (True, False):
        if not copies:
            for layer in model.bert.backbone.layers:
                for residual in layer.residuals():
                    residual.feeds_projection = False
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    layers = len(model.bert.backbone.layers)
    assert read == [torch.float32] + [torch.bfloat16] * (len(read) // 2 - 1) + [torch.float32] * (len(read) // 2)
    assert len(read) >= 2 * layers
    for with_copies, without in zip(*results):
        assert torch.equal(with_copies, without)


def test_a_batch_without_labels_has_zero_loss_and_zero_gradients():
    model = small_model().train()
    ids = torch.randint(5, 96, (2, 8))
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_balancing_of_experts_is_part_of_the_loss_in_training_alone():
    experts = {"name": "cdmoe", "num_experts": 25, "experts_per_head": 3, "retrieval_dim": 6, "load_balancing": 0.5}
    model, ids = small_model(channel_mixer=experts), torch.randint(5, 96, (2, 8))
    alone = model(input_ids=ids, labels=ids).loss
    together = model.train()(input_ids=ids, labels=ids).loss
    assert together - alone > 0.8  # 0.5 a layer, or a little less, when all experts are used alike


def test_every_layer_draws_its_own_values_by_our_rules():
    torch.manual_seed(0)
    model = MixerBertForMaskedLM(MixerBertConfig(mixer="hydra", hidden_size=256, num_hidden_layers=2, vocab_size=512))
    first, second = (layer.sequence.mixer for layer in model.bert.backbone.layers)
    for name in ("conv1d.weight", "conv1d.bias", "dt_bias", "in_proj.weight"):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name)), name
    bound = 7**-0.5
    assert 0.9 * bound < first.conv1d.weight.abs().max() <= bound
    assert 0.5 * bound < first.conv1d.bias.abs().max() <= bound
    assert first.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.bert.embeddings.word.weight[0].any()
    assert model.head.decoder.weight is model.bert.embeddings.word.weight


def test_a_saved_model_loads_with_the_same_logits(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    again = MixerBertForMaskedLM.from_pretrained(tmp_path).eval()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name
    ids = torch.randint(5, 96, (2, 9))
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, narrow):
    grads = []
    for enabled in (False, True):
        model = small_model().train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.randint(5, 96, (2, 8), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_labels_of_another_shape_are_refused():
    ids = torch.randint(5, 96, (2, 8))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 7\) for tokens of shape \(2, 8\)"):
        small_model()(input_ids=ids, labels=ids[:, :7])


def test_mixers_cycle_over_the_layers():
    model = small_model([{"name": "hydra", "d_state": 4}, "attention"], num_hidden_layers=3)
    names = [type(layer.sequence.mixer).__name__ for layer in model.bert.backbone.layers]
    assert names == ["Hydra", "Attention", "Hydra"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mixer": "hydar"}, r"model.mixer.name: unknown mixer 'hydar'; did you mean 'hydra'"),
        ({"mixer": {"name": "hydra", "expnd": 2}}, r"model.mixer.expnd: unknown key; did you mean 'expand'"),
        ({"mixer": {"name": "hydra", "expand": "two"}}, r"model.mixer.expand: 'two' is not of type int"),
        ({"mixer": {"name": "hydra", "headdim": 7}}, r"model.mixer.headdim: 7 does not divide"),
        ({"mixer": ["hydra", "x"]}, r"model.mixer\[1\].name: unknown mixer 'x'"),
        ({"mixer": None}, r"model.mixer: missing"),
        ({"name": "mosaic_bert"}, r"model.name: 'mosaic_bert': use mixer_bert with the attention mixer"),
        ({"model_config": {"max_position_embedding": 128}, "mixer": "hydra"}, "set max_position_embeddings"),
        ({"model_config": {"hiden_size": 128}, "mixer": "hydra"}, "did you mean 'hidden_size'"),
        ({"name": "hf_bert", "model_config": {"hiden_size": 1}}, "BertConfig has no such field; did you mean"),
        ({"mixer": "hydra", "pretrained_checkpoint": "/nowhere.pt"}, "model.pretrained_checkpoint: no such file"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(**config))
