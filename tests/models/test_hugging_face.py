"""Our encoders behave as models of transformers do: heads, loading, resizing, pipelines, Trainer, LoRA."""

import math

import pytest
import torch
import transformers
from mixer_instances import CASES

from anymixer.models import (
    MixerBertConfig,
    MixerBertForMaskedLM,
    MixerBertForQuestionAnswering,
    MixerBertForSequenceClassification,
    MixerBertForTokenClassification,
    MixerBertModel,
)

VOCAB = 96
HYDRA = {"name": "hydra", "d_state": 8, "headdim": 16}
# One instance of each registered mixer.
MIXERS = [case for case in CASES if case.id.endswith("-0")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sees", "old", "red", "house", "?", "."]
# transformers 4.56 renamed torch_dtype.
DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def config(mixer=HYDRA, **more):
    values = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
    return MixerBertConfig(mixer=mixer, **{**values, **more})


def model(mixer=HYDRA, cls=MixerBertForMaskedLM, **more):
    torch.manual_seed(0)
    made = cls(config(mixer, **more)).eval()
    for p in made.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return made


def ids(*shape):
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("cls", "labels", "shape"),
    [
        (MixerBertForSequenceClassification, {"labels": torch.tensor([2, 0])}, (2, 3)),
        (MixerBertForTokenClassification, {"labels": torch.tensor([[0, 1, 2, -100, 1, 0, 0]] * 2)}, (2, 7, 3)),
        (
            MixerBertForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 9])},
            (2, 7),
        ),
    ],
)
def test_a_head_on_a_pretrained_encoder(tmp_path, cls, labels, shape):
    pretrained = model()
    pretrained.save_pretrained(tmp_path)
    made = cls.from_pretrained(tmp_path, num_labels=3)
    for name, p in made.bert.named_parameters():
        assert torch.equal(p, pretrained.bert.get_parameter(name)), name
    output = made(ids(2, 7), **labels)
    logits = output.logits if "labels" in labels else output.start_logits
    assert tuple(logits.shape) == shape
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_token_labels_of_minus_100_teach_nothing():
    made = model(cls=MixerBertForTokenClassification, num_labels=3)
    labels = torch.tensor([[0, -100, 2, -100]])
    output = made(ids(1, 4), labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, [0, 2]], torch.tensor([0, 2]))
    torch.testing.assert_close(output.loss, expected)
    assert made(ids(1, 4), labels=torch.full((1, 4), -100)).loss.item() == 0.0


def test_labels_that_do_not_exclude_one_another():
    made = model(cls=MixerBertForSequenceClassification, num_labels=3)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    output = made(ids(2, 5), labels=labels)
    p = output.logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, expected)


def test_answers_outside_of_a_row_teach_nothing():
    made = model(cls=MixerBertForQuestionAnswering)
    start, end = torch.tensor([1, 50]), torch.tensor([2, 2])
    output = made(ids(2, 5), start_positions=start, end_positions=end)
    expected = -(output.start_logits.log_softmax(-1)[0, 1] + output.end_logits.log_softmax(-1)[[0, 1], [2, 2]].mean())
    torch.testing.assert_close(output.loss, expected / 2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_attentions_are_the_matrices_that_the_layers_apply(mixer):
    for prenorm in (False, True):
        made = model(mixer, cls=MixerBertModel, prenorm=prenorm)
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
        output = made(ids(2, 9), attention_mask=mask, output_attentions=True, output_hidden_states=True)
        assert len(output.attentions) == 2 and output.attentions[0].shape[-2:] == (9, 9)
        layer, before = made.backbone.layers[0].sequence, output.hidden_states[0]
        inner = layer.norm(before) if prenorm else before
        packing = packing_of(mask)
        mixed = layer.mixer.output(output.attentions[0] @ layer.mixer.values(inner, packing), inner, packing)
        after = before + mixed if prenorm else layer.norm(before + mixed)
        torch.testing.assert_close(after[mask.bool()], output.hidden_states[1][mask.bool()], rtol=1e-4, atol=1e-4)


def packing_of(mask):
    from anymixer.layers.packing import make_packing

    return make_packing(mask, None)


def test_outputs_are_what_was_asked_for():
    made = model()
    assert made(ids(1, 5)).attentions is None and made(ids(1, 5)).hidden_states is None
    assert len(made(ids(1, 5), output_attentions=True).attentions) == 2
    as_tuple = made(ids(1, 5), labels=ids(1, 5), output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 3 and len(as_tuple[2]) == 3
    made.config.output_hidden_states = True
    assert len(made(ids(1, 5)).hidden_states) == 3


@pytest.mark.parametrize("mixer", MIXERS)
def test_loads_again_the_same_and_in_bfloat16(tmp_path, mixer):
    made = model(mixer)
    made.save_pretrained(tmp_path / "a")
    again = MixerBertForMaskedLM.from_pretrained(tmp_path / "a").eval()
    assert again.head.decoder.weight is again.bert.embeddings.word.weight
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    half = MixerBertForMaskedLM.from_pretrained(tmp_path / "a", **{DTYPE: torch.bfloat16}).eval()
    assert {m.weight.dtype for m in half.modules() if isinstance(m, torch.nn.Linear)} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = made(ids(2, 11)).logits, half(ids(2, 11)).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("size", [120, 64])
def test_the_vocabulary_can_be_resized(tmp_path, size):
    made = model()
    before = made(ids(1, 7) % 60 + 4).logits
    made.resize_token_embeddings(size)
    assert made.config.vocab_size == size and made.head.decoder.weight is made.bert.embeddings.word.weight
    made.save_pretrained(tmp_path)
    again = MixerBertForMaskedLM.from_pretrained(tmp_path).eval()
    after = again(ids(1, 7) % 60 + 4).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :64], before[..., :64], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_lora_reaches_every_linear_layer(mixer):
    peft = pytest.importorskip("peft")
    made = model(mixer)
    linear = [name for name, m in made.bert.backbone.named_modules() if isinstance(m, torch.nn.Linear)]
    options = peft.LoraConfig(r=2, target_modules=[f"backbone.{name}" for name in linear], init_lora_weights=False)
    adapted = peft.get_peft_model(made, options)
    adapted(input_ids=ids(2, 9), labels=ids(2, 9)).loss.backward()
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(linear) and all("lora_" in name for name, _ in trained)
    for name, p in trained:
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    adapted.eval()
    expected = adapted(input_ids=ids(1, 9)).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids(1, 9)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["masked_lm", "sequence"])
def test_the_trainer_finetunes(tmp_path, head):
    pytest.importorskip("accelerate")
    cls = {"masked_lm": MixerBertForMaskedLM, "sequence": MixerBertForSequenceClassification}[head]
    made = cls(config(num_labels=2))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids(16, 8)]
    for row in rows:
        row["labels"] = row["input_ids"].clone() if head == "masked_lm" else (row["input_ids"][0] % 2).clone()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="epoch",
    )
    trainer = transformers.Trainer(model=made, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(tmp_path / "saved"))
    again = cls.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(ids(1, 8)).logits, made.eval()(ids(1, 8)).logits)


def test_pipelines(tokenizer):
    def pipe(task, cls, **more):
        return transformers.pipeline(task, model=model(cls=cls, vocab_size=16, **more), tokenizer=tokenizer)

    filled = pipe("fill-mask", MixerBertForMaskedLM)("the [MASK] sees the dog", top_k=2)
    assert len(filled) == 2 and 0 < filled[0]["score"] < 1
    features = pipe("feature-extraction", MixerBertModel)("the old cat")
    assert len(features[0]) == 5 and len(features[0][0]) == 32
    label = pipe("text-classification", MixerBertForSequenceClassification, num_labels=3)("the red house")
    assert label[0]["label"].startswith("LABEL_")
    entities = pipe("token-classification", MixerBertForTokenClassification, num_labels=3)("the red house")
    assert {e["word"] for e in entities} <= {"the", "red", "house"}
    both = pipe("text-classification", MixerBertForSequenceClassification)([{"text": "the", "text_pair": "cat"}])
    assert len(both) == 1
    if "question-answering" not in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks():
        return  # transformers 5 has none
    answer = pipe("question-answering", MixerBertForQuestionAnswering)
    found = answer(question="the old cat ?", context="the dog sees the red house .")
    assert found["answer"] in "the dog sees the red house ."
