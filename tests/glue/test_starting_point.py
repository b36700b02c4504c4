"""Weights and tokenizers out of every kind of checkpoint, and what is said of those that do not fit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from anymixer.checkpoints import hf_bert, published_hydra
from anymixer.data.tokenization import wordpiece_tokenizer
from anymixer.errors import UserError
from anymixer.glue.starting_point import checkpoint_digest, choose_tokenizer, open_starting_point, take_weights
from anymixer.models import MixerBertForMaskedLM, ModelConfig, build_classifier, build_model
from anymixer.training.composer_model import MixerComposerModel

GOLDEN = "tests/goldens/bert.safetensors"
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
CHANNEL = {"name": "mlp", "intermediate_size": 24}
ATTENTION = ModelConfig(mixer={"name": "attention", "num_heads": 2}, model_config=SMALL)
HYDRA = ModelConfig(mixer={"name": "hydra", "d_state": 4, "headdim": 8}, model_config=SMALL)
HF_FIELDS = SMALL | {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40}
HF_BERT = ModelConfig(name="hf_bert", model_config=HF_FIELDS)
# HF_FIELDS as ours.
BERT = ModelConfig(
    mixer={"name": "attention", "num_heads": 2, "dropout": 0.1},
    model_config=SMALL
    | {
        "channel_mixer": CHANNEL,
        "position_embeddings": "learned",
        "max_position_embeddings": 40,
        "norm_eps": 1e-12,
    },
)


def pretrained(config):
    torch.manual_seed(1)
    model = build_model(config)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def classifier(config):
    torch.manual_seed(2)
    return build_classifier(config, 2).eval()


def composer_checkpoint(path, model, tokenizer=None):
    """What Composer's Trainer writes, as far as weights, configuration and tokenizer go."""
    wrapped = MixerComposerModel(model, tokenizer)
    state = {"model": wrapped.state_dict(), "integrations": {"huggingface": wrapped.get_metadata()}}
    torch.save({"state": state, "rng": []}, path)
    return str(path)


def encoder_states(model):
    """The encoder's output for one text and a padded one."""
    ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    mask = (ids > 0).long()
    kinds = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    with torch.no_grad():
        states = model.bert(input_ids=ids, attention_mask=mask, token_type_ids=kinds).last_hidden_state
    return states[mask.bool()]


@pytest.mark.parametrize("config", [ATTENTION, HYDRA, HF_BERT], ids=["attention", "hydra", "hf_bert"])
@pytest.mark.parametrize("form", ["run", "pt", "folder"])
def test_a_checkpoint_s_encoder_is_taken(tmp_path, config, form, tokenizer):
    source, target = pretrained(config), classifier(config)
    if form == "folder":
        source.save_pretrained(tmp_path)
        name = str(tmp_path)
    else:
        name = composer_checkpoint(tmp_path / "ep0-ba5-rank0.pt", source)
    if form == "run":
        (tmp_path / "latest-rank0.pt").symlink_to("ep0-ba5-rank0.pt")
        name = str(tmp_path)
    before = target.classifier.weight.clone()
    said = take_weights(target, open_starting_point(name))
    torch.testing.assert_close(encoder_states(target), encoder_states(source))
    assert torch.equal(target.classifier.weight, before)
    assert "drawn anew: " in said and "classifier" in said.split("drawn anew: ")[1].split(";")[0]
    assert "head" in said.split("not used: ")[1] or "cls" in said.split("not used: ")[1]


def test_a_finetuned_checkpoint_gives_its_pooler_and_not_its_classifier(tmp_path):
    source, target = classifier(ATTENTION), build_classifier(ATTENTION, 3)
    source.save_pretrained(tmp_path)
    drawn = target.classifier.weight.clone()
    said = take_weights(target, open_starting_point(str(tmp_path)))
    assert torch.equal(target.pooler.dense.weight, source.pooler.dense.weight)
    assert torch.equal(target.classifier.weight, drawn) and "drawn anew: classifier; not used: classifier" in said


@pytest.mark.parametrize("old_names", [False, True])
def test_a_hugging_face_bert_becomes_ours(tmp_path, old_names):
    source, target = pretrained(HF_BERT), classifier(BERT)
    source.save_pretrained(tmp_path)
    if old_names:  # as the first published checkpoints have them
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in source.state_dict().items()
            if name != "cls.predictions.decoder.weight"
        }
        state["bert.embeddings.position_ids"] = torch.arange(40)[None]
        state["cls.seq_relationship.weight"] = torch.zeros(2, 16)
        save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    said = take_weights(target, open_starting_point(str(tmp_path)))
    assert "a Hugging Face BERT" in said
    torch.testing.assert_close(encoder_states(target), encoder_states(source), rtol=1e-4, atol=1e-5)


def test_bert_s_masked_lm_head_and_configuration_convert_too():
    source = pretrained(HF_BERT)
    model = MixerBertForMaskedLM(hf_bert.convert_config(source.config.to_dict())).eval()
    model.load_state_dict(hf_bert.convert_weights(source.state_dict()), strict=True)
    ids = torch.randint(5, 32, (2, 9))
    torch.testing.assert_close(model(input_ids=ids).logits, source(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="hidden_act gelu_new"):
        hf_bert.convert_config(BertConfig(hidden_act="gelu_new").to_dict())
    with pytest.raises(KeyError, match=r"not a parameter of Hugging Face's BERT: bert\.extra"):
        hf_bert.convert_weights({"bert.extra": torch.zeros(1)})


def test_a_bare_bert_has_its_pooler(tmp_path):
    torch.manual_seed(1)
    source = BertModel(BertConfig(**HF_FIELDS)).eval()
    source.save_pretrained(tmp_path)
    for config, pooler in ((HF_BERT, "bert.pooler"), (BERT, "pooler")):
        target = classifier(config)
        assert "drawn anew: classifier;" in take_weights(target, open_starting_point(str(tmp_path)))
        torch.testing.assert_close(target.get_submodule(pooler).dense.weight, source.pooler.dense.weight)


def test_a_raw_file_of_the_published_hydra(tmp_path, request):
    with safe_open(request.config.rootpath / GOLDEN, "pt") as file:
        published = {key[6:]: file.get_tensor(key) for key in file.keys() if key.startswith("state.")}  # noqa: SIM118
        options = json.loads(file.metadata()["config"])
    path = tmp_path / "hydra.pt"
    torch.save({"state": {"model": {f"model.{name}": value for name, value in published.items()}}}, path)
    ours = published_hydra.convert_config(options)
    fields = ("vocab_size", "hidden_size", "num_hidden_layers")
    config = ModelConfig(mixer=ours.mixer, model_config={key: getattr(ours, key) for key in fields})
    target = build_classifier(config, 2)
    assert "(a published Hydra)" in take_weights(target, open_starting_point(str(path)))
    word = published["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(target.bert.embeddings.word.weight, word)


def test_a_raw_file_of_mosaic_bert(tmp_path):
    """Its names on the weights of the model that it is: attention with ALiBi and a GeGLU."""
    theirs = [
        ("bert.embeddings.word.", "bert.embeddings.word_embeddings."),
        ("bert.embeddings.token_type.", "bert.embeddings.token_type_embeddings."),
        ("bert.embeddings.norm.", "bert.embeddings.LayerNorm."),
        ("bert.backbone.layers.", "bert.encoder.layer."),
        (".sequence.mixer.qkv_proj.", ".attention.self.Wqkv."),
        (".sequence.mixer.out_proj.", ".attention.output.dense."),
        (".sequence.norm.", ".attention.output.LayerNorm."),
        (".channel.mixer.gate_up.", ".mlp.gated_layers."),
        (".channel.mixer.down.", ".mlp.wo."),
        (".channel.norm.", ".mlp.layernorm."),
        ("head.decoder.", "cls.predictions.decoder."),
        ("head.dense.", "cls.predictions.transform.dense."),
        ("head.norm.", "cls.predictions.transform.LayerNorm."),
    ]
    config = ModelConfig(
        mixer={"name": "attention", "num_heads": 2, "positions": "alibi"},
        model_config=SMALL | {"channel_mixer": {"name": "glu", "intermediate_size": 24}, "norm_eps": 1e-12},
    )
    source, target = pretrained(config), classifier(config)
    state = {}
    for name, value in source.state_dict().items():
        for ours, other in theirs:
            name = name.replace(ours, other)
        state[f"model.{name}"] = value
    torch.save({"state": {"model": state}}, tmp_path / "mosaic.pt")
    assert "(a MosaicBERT)" in take_weights(target, open_starting_point(str(tmp_path / "mosaic.pt")))
    torch.testing.assert_close(encoder_states(target), encoder_states(source))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (ATTENTION, HYDRA, r"mixer of layer 0 is Attention in the checkpoint and Hydra in the configuration"),
        (HF_BERT, ATTENTION, r"\(a Hugging Face BERT\) is not the configured model: "),
        (ATTENTION, HF_BERT, r"is not the configured model: "),
        (
            ModelConfig(mixer={"name": "attention", "num_heads": 4}, model_config=SMALL),
            ATTENTION,
            "num_heads is 4 in the checkpoint and 2 in the configuration",
        ),
        (
            ModelConfig(mixer=ATTENTION.mixer, model_config=SMALL | {"num_hidden_layers": 3}),
            ATTENTION,
            "num_hidden_layers is 3 in the checkpoint and 2",
        ),
        (
            ModelConfig(
                mixer=ATTENTION.mixer, model_config=ATTENTION.model_config | {"channel_mixer": [None, CHANNEL]}
            ),
            ATTENTION,
            "channel_mixer of layer 1 is MLP in the checkpoint and None in the configuration",
        ),
    ],
    ids=["mixer", "bert", "ours-as-bert", "heads", "layers", "channel"],
)
def test_another_model_s_checkpoint_is_refused_with_its_differences(tmp_path, source, target, message):
    name = composer_checkpoint(tmp_path / "ep0-ba5-rank0.pt", pretrained(source))
    with pytest.raises(UserError, match=message):
        take_weights(classifier(target), open_starting_point(name))


def test_without_a_configuration_the_keys_that_do_not_fit_are_named(tmp_path):
    path, own = tmp_path / "flat.pt", pretrained(HYDRA).state_dict()
    own["bert.embeddings.word.weight"] = torch.zeros(40, 16)
    del own["bert.backbone.layers.1.sequence.norm.bias"]
    torch.save(own, path)
    with pytest.raises(UserError) as raised:
        take_weights(classifier(HYDRA), open_starting_point(str(path)))
    assert "1 missing (bert.backbone.layers.1.sequence.norm.bias)" in str(raised.value)
    assert "bert.embeddings.word.weight: [40, 16] for the model's [32, 16]" in str(raised.value)
    torch.save({"some.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"unknown names\) does not fit the model: .* missing"):
        take_weights(classifier(HYDRA), open_starting_point(str(path)))


def test_dropout_may_differ(tmp_path):
    changed = ModelConfig(mixer=ATTENTION.mixer | {"dropout": 0.3}, model_config=SMALL | {"hidden_dropout_prob": 0.3})
    name = composer_checkpoint(tmp_path / "ep0-ba5-rank0.pt", pretrained(ATTENTION))
    assert "a model of ours" in take_weights(classifier(changed), open_starting_point(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "no such file or folder: /nowhere/at/all"),
        ("missing.pt", "no such file or folder: missing.pt"),
        ("{tmp}", "holds no checkpoint"),
        ("{tmp}/half.pt", "is not a whole checkpoint"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, message):
    if name.endswith("half.pt"):
        torch.save(pretrained(ATTENTION).state_dict(), tmp_path / "half.pt")
        content = (tmp_path / "half.pt").read_bytes()
        (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=message):
        open_starting_point(name.format(tmp=tmp_path))


def test_a_name_that_the_hub_cannot_give(monkeypatch):
    def snapshot_download(name, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="'bert-base-uncased' is neither a file nor a folder"):
        open_starting_point("bert-base-uncased")


def test_the_digest_is_of_the_weights(tmp_path):
    pretrained(ATTENTION).save_pretrained(tmp_path)
    before = checkpoint_digest(str(tmp_path))
    assert open_starting_point(str(tmp_path)).digest == before
    pretrained(HYDRA).save_pretrained(tmp_path)
    assert checkpoint_digest(str(tmp_path)) != before


def test_the_checkpoint_s_tokenizer_is_used_and_another_one_refused(tmp_path, tokenizer, tokenizer_folder):
    name = composer_checkpoint(tmp_path / "ep0-ba5-rank0.pt", pretrained(ATTENTION), tokenizer)
    point = open_starting_point(name)
    assert choose_tokenizer(point, None).get_vocab() == tokenizer.get_vocab()
    assert choose_tokenizer(point, str(tokenizer_folder)).get_vocab() == tokenizer.get_vocab()
    other = wordpiece_tokenizer({word: number for number, word in enumerate(reversed(tokenizer.get_vocab()))})
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not the tokenizer of"):
        choose_tokenizer(point, str(tmp_path / "other"))


def test_a_tokenizer_beside_the_checkpoint(tmp_path, tokenizer):
    name = composer_checkpoint(tmp_path / "ep0-ba5-rank0.pt", pretrained(ATTENTION))
    point = open_starting_point(name)
    with pytest.raises(UserError, match=r"tokenizer_name: not set, and .* holds none"):
        choose_tokenizer(point, None)
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    assert choose_tokenizer(open_starting_point(name), None).get_vocab() == tokenizer.get_vocab()


def test_hf_masked_lm_and_ours_give_one_loss(tmp_path):
    """The classifiers over the same weights: transformers' own and ours."""
    torch.manual_seed(3)
    source = BertForMaskedLM(BertConfig(**HF_FIELDS))
    source.save_pretrained(tmp_path)
    theirs, ours = classifier(HF_BERT), classifier(BERT)
    take_weights(theirs, open_starting_point(str(tmp_path)))
    ours.load_state_dict(hf_bert.convert_weights(theirs.state_dict()), strict=True)
    ids = torch.randint(5, 32, (4, 9))
    labels = torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(
        ours(input_ids=ids, labels=labels).loss, theirs(input_ids=ids, labels=labels).loss, rtol=1e-5, atol=1e-6
    )
