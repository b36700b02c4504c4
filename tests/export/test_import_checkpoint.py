"""Other projects' checkpoints become runs of ours with the same logits, or are refused in one line."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from mixer_instances import CASES, CAUSAL_CASES
from safetensors import safe_open
from safetensors.torch import save_file

from anymixer.errors import UserError
from anymixer.export.folder import build_exported, write_folder
from anymixer.export.import_checkpoint import import_checkpoint
from anymixer.export.source import open_checkpoint
from anymixer.export.verify import Expected, verify
from anymixer.fill_mask import load_run
from anymixer.models import ModelConfig, build_model

GOLDENS = Path(__file__).parents[1] / "goldens"
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("this_ran",))


def hydra_golden():
    """Weights by their published names, configuration, input, logits."""
    with safe_open(GOLDENS / "bert.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return weights, config, tensors["input_ids"], tensors["logits"]


def write_vocabulary(folder, words):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"w{i}" for i in range(words))]))


def imported(folder):
    """The imported model, as main.py's `pretrained_checkpoint` would load it."""
    from anymixer.config import load_config

    return build_model(load_config(folder / "config.yaml").model).eval()


def save_bert(folder, **changes):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(**{**BERT, **changes})
    model = BertForMaskedLM(config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    return model


def mosaic_weights(width=32, layers=2, vocab=96, inner=48):
    """Weights by the names and shapes of MosaicBERT's published checkpoints."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * 0.2

    word = draw(vocab, width)
    weights = {
        "bert.embeddings.word_embeddings.weight": word,
        "bert.embeddings.token_type_embeddings.weight": draw(2, width),
        "cls.predictions.decoder.weight": word,
        "cls.predictions.decoder.bias": draw(vocab),
        "cls.predictions.transform.dense.weight": draw(width, width),
        "cls.predictions.transform.dense.bias": draw(width),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}."
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}mlp.layernorm"]
        weights |= {
            f"{layer}attention.self.Wqkv.weight": draw(3 * width, width),
            f"{layer}attention.self.Wqkv.bias": draw(3 * width),
            f"{layer}attention.output.dense.weight": draw(width, width),
            f"{layer}attention.output.dense.bias": draw(width),
            f"{layer}mlp.gated_layers.weight": draw(2 * inner, width),
            f"{layer}mlp.wo.weight": draw(width, inner),
            f"{layer}mlp.wo.bias": draw(width),
        }
    return weights | {f"{n}.{kind}": 1 + draw(width) for n in norms for kind in ("weight", "bias")}


def mosaic_logits(w, ids, heads):
    """MosaicBERT's published arithmetic, written out: one row of ids [length] -> [length, vocabulary]."""

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    length, width = len(ids), w["bert.embeddings.word_embeddings.weight"].shape[1]
    h = w["bert.embeddings.word_embeddings.weight"][ids] + w["bert.embeddings.token_type_embeddings.weight"][0]
    h = norm(h, "bert.embeddings.LayerNorm")
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    for i in range(2):
        layer = f"bert.encoder.layer.{i}."
        q, k, v = dense(h, f"{layer}attention.self.Wqkv").view(length, 3, heads, width // heads).unbind(1)
        mixed = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head].T / math.sqrt(width // heads) - 2 ** (-8 * (head + 1) / heads) * distance
            mixed.append(scores.softmax(-1) @ v[:, head])
        h = norm(
            h + dense(torch.cat(mixed, -1), f"{layer}attention.output.dense"), f"{layer}attention.output.LayerNorm"
        )
        gated, plain = dense(h, f"{layer}mlp.gated_layers").chunk(2, -1)
        h = norm(h + dense(gelu(gated) * plain, f"{layer}mlp.wo"), f"{layer}mlp.layernorm")
    h = norm(gelu(dense(h, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    return dense(h, "cls.predictions.decoder")


@pytest.mark.parametrize("form", ["flat", "nested", "safetensors", "without config", "the file itself"])
def test_a_published_hydra_gives_its_logits(tmp_path, form):
    weights, config, ids, logits = hydra_golden()
    source = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "nested":
        torch.save({"state": {"model": {f"model.{k}": v for k, v in weights.items()}}, "rng": []}, source)
    elif form == "safetensors":
        save_file(weights, source)
    else:
        torch.save(weights, source)
    if form == "the file itself":
        source = GOLDENS / "bert.safetensors"
    elif form != "without config":
        (tmp_path / "config.json").write_text(json.dumps(config))
    lines = import_checkpoint(str(source), tmp_path / "out")
    assert any("agree with those recorded" in line for line in lines) == (form == "the file itself")
    model = imported(tmp_path / "out")
    assert (model(input_ids=ids).logits - logits).abs().max() < 1e-4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "latest-rank0.pt"]


def test_a_name_on_the_hub_is_taken_from_the_cache(tmp_path, monkeypatch):
    """The published Hydra's repository: a raw file of weights and no configuration."""
    from huggingface_hub import constants

    weights, _, ids, logits = hydra_golden()
    snapshot = tmp_path / "hub" / "models--them--hydra" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    torch.save(weights, snapshot / "hydra_bert_2layers.pt")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    import_checkpoint("them/hydra", tmp_path / "out")
    assert (imported(tmp_path / "out")(input_ids=ids).logits - logits).abs().max() < 1e-4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="SOURCE: 'them/other' is neither a file nor a folder, and no weights"):
        import_checkpoint("them/other", tmp_path / "other")


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_a_bert_gives_its_logits(tmp_path, form):
    source = tmp_path / "bert"
    bert = save_bert(source, vocab_size=300)
    write_vocabulary(source, 200)
    if form == "bin":
        (source / "model.safetensors").unlink()
        torch.save(bert.state_dict(), source / "pytorch_model.bin")
    elif form == "sharded":
        (source / "model.safetensors").unlink()
        bert.save_pretrained(source, max_shard_size="40KB")
    lines = import_checkpoint(str(source), tmp_path / "out")
    assert "agree with those of transformers' BertForMaskedLM" in lines[1]
    model, tokenizer, _ = load_run(tmp_path / "out")
    ids = torch.randint(5, 300, (2, 11))
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    expected = bert(input_ids=ids, attention_mask=mask).logits
    ours = model(input_ids=ids, attention_mask=mask).logits
    assert (ours - expected)[mask.bool()].abs().max() < 1e-4
    assert len(tokenizer) == 205


def test_a_mosaic_bert_gives_its_logits(tmp_path):
    source = tmp_path / "mosaic"
    source.mkdir()
    weights = mosaic_weights()
    torch.save(weights, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps({**BERT, "alibi_starting_size": 512, "model_type": "bert"}))
    lines = import_checkpoint(str(source), tmp_path / "out")
    assert "MosaicBERT" in lines[0] and "not compared" in lines[1]
    ids = torch.randint(5, 96, (13,))
    logits = imported(tmp_path / "out")(input_ids=ids[None]).logits[0]
    assert (logits - mosaic_logits(weights, ids, heads=4)).abs().max() < 1e-4


def composer_checkpoint(path, model):
    """What Composer's Trainer writes, as far as the model goes."""
    config = {"file_extension": ".json", "content": model.config.to_dict()}
    state = {
        "model": {f"model.{name}": value for name, value in model.state_dict().items()},
        "integrations": {"huggingface": {"model": {"config": config}, "tokenizer": {}}},
    }
    torch.save({"state": state, "rng": []}, path)


def firsts(cases):
    """The first instance of each mixer."""
    return list({case.values[0]["name"]: case for case in reversed(cases)}.values())


@pytest.mark.parametrize(
    ("name", "spec"),
    [("mixer_bert", *case.values) for case in firsts(CASES)] + [("causal_lm", *c.values) for c in firsts(CAUSAL_CASES)],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_a_checkpoint_exported_and_imported_has_the_same_loss(tmp_path, name, spec):
    """For every registered mixer, from a checkpoint to the next one's, in evaluation over some batches."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, mixer=spec, model_config={**SMALL, "channel_mixer": "glu"})).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    composer_checkpoint(tmp_path / "ep0-ba7-rank0.pt", model)
    write_folder(build_exported(open_checkpoint(str(tmp_path / "ep0-ba7-rank0.pt"))), tmp_path / "exported")
    import_checkpoint(str(tmp_path / "exported"), tmp_path / "out")
    again = imported(tmp_path / "out")
    for ids in torch.randint(5, 96, (3, 2, 9)):
        labels = ids.where(torch.arange(9) % 3 == 0, -100)
        mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
        with torch.no_grad():
            before, after = (m(ids, attention_mask=mask, labels=labels).loss for m in (model, again))
        assert torch.equal(before, after)


def test_an_imported_checkpoint_can_be_exported(tmp_path):
    """The published Hydra's logits, from its weights through our checkpoint to the exported folder's."""
    weights, _, ids, logits = hydra_golden()
    torch.save(weights, tmp_path / "hydra.pt")
    import_checkpoint(str(tmp_path / "hydra.pt"), tmp_path / "out")
    made = build_exported(open_checkpoint(str(tmp_path / "out")))
    write_folder(made, tmp_path / "exported")
    verdict = verify([Expected(tmp_path / "exported", made.model, made.auto_class, ids.tolist())], made.blocked)[0]
    assert verdict.problem is None
    assert (made.model(input_ids=ids).logits - logits).abs().max() < 1e-4


def test_heads_that_a_masked_lm_has_not_are_left_out_and_said(tmp_path):
    from transformers import BertConfig, BertForPreTraining

    BertForPreTraining(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    lines = import_checkpoint(str(tmp_path / "bert"), tmp_path / "out")
    assert any("left out" in line and "cls.seq_relationship.weight" in line for line in lines)


def spoil_missing(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    del weights["bert.encoder.layer.1.mlp.wo.weight"]
    torch.save(weights, folder / "pytorch_model.bin")


def spoil_unknown(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights | {"bert.encoder.rotary.freqs": torch.ones(2)}, folder / "pytorch_model.bin")


def spoil_half(folder):
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])


def spoil_vocabulary(folder):
    (folder / "config.json").write_text(json.dumps({**BERT, "vocab_size": 100}))


def spoil_architecture(folder):
    torch.save({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)}, folder / "pytorch_model.bin")


def spoil_pickle(folder):
    torch.save({"weights": RunsCode()}, folder / "pytorch_model.bin")


def spoil_config(folder):
    (folder / "config.json").unlink()


def spoil_tied(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights | {"cls.predictions.decoder.weight": torch.ones(96, 32)}, folder / "pytorch_model.bin")


def spoil_tokenizer(folder):
    write_vocabulary(folder, 200)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, r"1 missing \(bert.backbone.layers.1.channel.mixer.down.weight\)"),
        (spoil_unknown, "not a parameter of MosaicBERT: bert.encoder.rotary.freqs"),
        (spoil_half, "is not a whole checkpoint"),
        (spoil_vocabulary, r"of another shape \(bert.embeddings.word.weight: \[96, 32\] for the model's \[100, 32\]"),
        (spoil_architecture, "is no model that can be imported .* parameters like transformer.h.0"),
        (spoil_pickle, "is refused: it holds more than tensors"),
        (spoil_config, "name it with --config"),
        (spoil_tied, "decoder and word embeddings differ"),
        (spoil_tokenizer, "205 entries, the model 96"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, call_cli, capsys, spoil, message):
    import re

    monkeypatch.chdir(tmp_path)
    source = tmp_path / "mosaic"
    source.mkdir()
    torch.save(mosaic_weights(), source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(BERT))
    spoil(source)
    assert call_cli("import", source, "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and re.search(message, error), error
    assert [p.name for p in tmp_path.iterdir()] == ["mosaic"]


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"OUT: .* exists; nothing was touched"):
        import_checkpoint(str(GOLDENS / "bert.safetensors"), tmp_path / "out")
    with pytest.raises(UserError, match="SOURCE: no such file or folder"):
        import_checkpoint(str(tmp_path / "nowhere.pt"), tmp_path / "new")


def test_logits_that_are_not_the_originals_are_refused(tmp_path, monkeypatch):
    """A BERT whose configuration says another number of heads fits all shapes."""
    from anymixer.checkpoints import hf_bert

    save_bert(tmp_path / "bert")
    convert = hf_bert.convert_config
    monkeypatch.setattr(hf_bert, "convert_config", lambda config: convert({**config, "num_attention_heads": 2}))
    with pytest.raises(UserError, match="logits differ from those of transformers' BertForMaskedLM by"):
        import_checkpoint(str(tmp_path / "bert"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_that_a_configuration_names_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
    model = build_model(ModelConfig(mixer={"name": "attention", "num_heads": 4}, model_config=SMALL))
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["mixer"] = {"name": "evil", "module": str(tmp_path / "evil.py")}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its mixer would run the code in .*evil.py; nothing of it is run here"):
        import_checkpoint(str(tmp_path / "model"), tmp_path / "out")


def test_a_folder_of_several_files_or_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"SOURCE: .* holds no checkpoint \(no latest-rank0.pt, "):
        import_checkpoint(str(tmp_path), tmp_path / "out")
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds several files of weights \(a.pt, b.safetensors\); name one of them"):
        import_checkpoint(str(tmp_path), tmp_path / "out")
