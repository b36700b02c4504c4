"""Doge and Cheems: the published snippets, the published sizes, and that the presets are the one language model."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from anymixer import CheemsConfig, CheemsForCausalLM, DMAttn, DogeConfig, DogeForCausalLM
from anymixer.config import load_config
from anymixer.errors import UserError
from anymixer.layers.channel_mixers import channel_mixers
from anymixer.mixers import parse_mixer
from anymixer.models import build_model
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

ROOT = Path(__file__).parents[2]
DMATTN = """
import torch
from anymixer import DMAttn

batch, seq_len, dim = 2, 16, 64
x = torch.rand(batch, seq_len, dim)
attention_mask = torch.ones(batch, seq_len)
attn = DMAttn(
    d_model=dim,
    n_heads=1,
    max_position_embeddings=seq_len,
    layer_idx=0,
)
y, past_key_values = attn(x, attention_mask)
print(f"Input shape: {x.shape}, Output shape: {y.shape}")
"""
CDMOE = """
import torch
from anymixer import CDMoE

batch, seq_len, dim = 2, 16, 64
x = torch.rand(batch, seq_len, dim)
cdmoe = CDMoE(
    d_model=dim,
    act_fn="silu",
    d_ff=dim * 4,
    d_private_expert_retrieval=64,
    n_experts=64,
    n_experts_heads=1,
    n_experts_per_head=2,
)
y = cdmoe(x)
print(f"Input shape: {x.shape}, Output shape: {y.shape}")
"""
MODEL = """
import torch
from anymixer import NAMEConfig
from anymixer import NAMEForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("<your_model_path_or_name>")
config = NAMEConfig()
model = NAMEForCausalLM(config)
input_ids = tokenizer("Hi, how are you today?", return_tensors="pt")
outputs = model.generate(**input_ids, max_length=100)
print(tokenizer.batch_decode(outputs))
"""
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {"is_moe": True, "num_cdmoe_experts": 16, "num_cdmoe_heads": 2, "num_cdmoe_experts_per_head": 2}


@pytest.mark.parametrize("snippet", [DMATTN, CDMOE], ids=["DMAttn", "CDMoE"])
def test_the_published_modules_run_word_for_word(snippet, capsys):
    exec(snippet, {})
    shape = "torch.Size([2, 16, 64])"
    assert capsys.readouterr().out == f"Input shape: {shape}, Output shape: {shape}\n"


@pytest.fixture
def tokenizer_folder(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level, model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(tmp_path)
    return tmp_path


def small_by_default(monkeypatch, config):
    """The same snippet with small models: the published sizes take minutes on a laptop."""
    original = config.__init__
    monkeypatch.setattr(
        config, "__init__", lambda self, **kwargs: original(self, **{**SMALL, "vocab_size": 300, **kwargs})
    )


@pytest.mark.parametrize("name", ["Doge", "Cheems"])
@pytest.mark.parametrize("size", ["small", pytest.param("published", marks=pytest.mark.slow)])
def test_the_published_models_generate_word_for_word(name, size, tokenizer_folder, capsys, monkeypatch):
    if size == "small":
        small_by_default(monkeypatch, {"Doge": DogeConfig, "Cheems": CheemsConfig}[name])
    torch.manual_seed(0)
    names = {}
    exec(MODEL.replace("NAME", name).replace("<your_model_path_or_name>", str(tokenizer_folder)), names)
    ids = names["outputs"]
    assert ids.shape[1] <= 100 and (ids.shape[1] == 100 or ids[0, -1] == names["config"].eos_token_id)
    assert "Hi, how are you today?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "kv_heads", "millions"),
    [(256, 8, 2, 1, 13), (512, 16, 4, 2, 54), (768, 24, 6, 3, 152), (1024, 32, 8, 4, 335)],
)
def test_the_published_sizes(hidden, layers, heads, kv_heads, millions):
    config = DogeConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        qk_norm=True,
    )
    with torch.device("meta"):
        model = DogeForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) // 10**6 == millions  # published rounded down


RECIPES = {
    "doge_20m": 13_118_728,
    "doge_60m": 54_571_552,
    "doge_160m": 152_676_168,
    "doge_320m": 335_750_272,
    "doge_moe_20m": 17_460_488,
    "cheems_60m": 58_259_060,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_the_presets(name):
    model = load_config(ROOT / "yamls" / "causal" / f"{name}.yaml").model
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(model).parameters())
    assert parameters == RECIPES[name]
    config, first = model.hugging_face_config(), model.hugging_face_config().layer_mixers()
    preset = CheemsConfig if name.startswith("cheems") else DogeConfig
    attention = next(mixer for mixer in first if mixer["name"] == "dma")
    same = preset(
        hidden_size=config.hidden_size,
        intermediate_size=config.channel_mixer["intermediate_size"],
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["num_kv_heads"],
        qk_norm=attention.get("qk_norm", False),
        is_moe="moe" in name,
        num_cdmoe_experts=1024,
        num_cdmoe_heads=1,
        num_cdmoe_experts_per_head=2,
    )
    for ours, published in zip(first, same.layer_mixers()):
        assert parse_mixer(ours, config.hidden_size) == parse_mixer(published, config.hidden_size)
    channels = [channel_mixers.parse(c.channel_mixer, "channel_mixer") for c in (config, same)]
    assert channels[0] == channels[1] and config.residual_options() == same.residual_options()


@pytest.mark.parametrize("config", [DogeConfig(**SMALL), DogeConfig(**SMALL, **MOE), CheemsConfig(2, 1, **SMALL)])
def test_saved_they_load_as_what_they_are_and_as_the_one_model(config, tmp_path):
    torch.manual_seed(0)
    model = DogeForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, 9))
    expected = model(ids).logits
    assert torch.equal(MixerLMForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)
    for cls in (DogeConfig, CheemsConfig):
        again = cls.from_pretrained(tmp_path)
        assert again.mixer == config.mixer and again.channel_mixer == config.channel_mixer
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=6, use_cache=True, eos_token_id=None),
        model.generate(ids, max_new_tokens=6, use_cache=False, eos_token_id=None),
    )


@pytest.mark.parametrize("options", [{}, MOE, {"keep_window_size": 4, "qk_norm": True}])
def test_no_token_knows_the_future_or_the_other_rows(options):
    torch.manual_seed(0)
    model = DogeForCausalLM(DogeConfig(**SMALL, **options, initializer_range=0.2)).eval()
    ids = torch.randint(3, 60, (3, 12))
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 8:] = torch.randint(3, 60, (3, 4))
    torch.testing.assert_close(model(changed).logits[:, :8], logits[:, :8], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(ids[1:2]).logits, logits[1:2], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_keeps_the_gradients_of_the_balance_of_experts():
    config = DogeConfig(**SMALL, **MOE)
    config.channel_mixer["load_balancing"] = 1.0
    ids, gradients = torch.randint(3, 60, (2, 12)), []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = DogeForCausalLM(config).train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_one_layer_of_eight_is_attention_and_scans_do_not_blow_up():
    config = CheemsConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=16, vocab_size=60)
    names = [mixer["name"] for mixer in config.layer_mixers()]
    assert names == (["ssd"] * 7 + ["dma"]) * 2
    torch.manual_seed(0)
    model = CheemsForCausalLM(CheemsConfig(2, 1, **SMALL)).eval()
    hidden = model.model(torch.randint(3, 60, (1, 1500)), output_hidden_states=True)[0]
    assert max(h.abs().max() for h in hidden) < 100


def test_the_module_continues_from_what_it_returns():
    torch.manual_seed(0)
    attn = DMAttn(d_model=16, n_heads=2, max_position_embeddings=4).eval()
    x = torch.randn(2, 11, 16)
    whole, _ = attn(x)
    first, past = attn(x[:, :6])
    second, past = attn(x[:, 6:], past_key_values=past)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-6)
    assert past["k"].shape == (2, 2, 4, 8)


def test_the_published_number_of_experts_is_refused_in_words():
    with pytest.raises(UserError, match="num_experts: 16348 is no square"):
        DogeForCausalLM(DogeConfig(**SMALL, is_moe=True, num_cdmoe_experts=16348))
