"""The pretraining configuration: what is filled in, what is refused, and that it stays quick to import."""

from pathlib import Path

import pytest

from anymixer.config import PretrainConfig, dump_config, load_config
from anymixer.errors import UserError

BASE = """
data_local: my-data
tokenizer_name: my-data/tokenizer
model:
  mixer: {name: hydra, d_state: 16}
  model_config: {hidden_size: 32, num_hidden_layers: 2}
"""


@pytest.fixture(autouse=True)
def no_run_name_from_outside(monkeypatch):
    monkeypatch.delenv("COMPOSER_RUN_NAME", raising=False)


def load(folder: Path, text: str = "", *overrides: str) -> PretrainConfig:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "small.yaml"
    path.write_text("inherits: base.yaml\n" + text)
    return load_config(path, overrides)


def failure(folder: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


def test_loaders_take_what_they_leave_unset_from_the_top(tmp_path):
    config = load(tmp_path, "max_seq_len: 256\nmlm_probability: 0.2\n")
    train, evaluation = config.train_loader, config.eval_loader
    assert (train.dataset.local, train.dataset.remote, train.dataset.max_seq_len) == ("my-data", None, 256)
    assert (evaluation.dataset.local, evaluation.dataset.max_seq_len) == ("my-data", 256)
    assert (train.dataset.split, train.dataset.shuffle, train.drop_last) == ("train", True, True)
    assert (evaluation.dataset.split, evaluation.dataset.shuffle, evaluation.drop_last) == (
        "val",
        False,
        False,
    )
    assert (train.dataset.mlm_probability, evaluation.dataset.mlm_probability) == (0.2, 0.15)


def test_loaders_keep_what_they_set(tmp_path):
    text = (
        "train_loader: {drop_last: false, dataset: {local: other, shuffle: no, mlm_probability: 0.4}}\n"
        "eval_loader: {dataset: {split: test, max_seq_len: 512, mlm_probability: '${mlm_probability}'}}\n"
    )
    config = load(tmp_path, text, "data_local=elsewhere")
    train, evaluation = config.train_loader, config.eval_loader
    assert (train.drop_last, train.dataset.local, train.dataset.shuffle) == (False, "other", False)
    assert train.dataset.mlm_probability == 0.4
    assert (evaluation.dataset.local, evaluation.dataset.split) == ("elsewhere", "test")
    assert (evaluation.dataset.max_seq_len, evaluation.dataset.mlm_probability) == (512, 0.30)


def test_streams_say_themselves_where_they_are(tmp_path):
    streams = "{wiki: {local: w, proportion: 0.5}, c4: {local: c, proportion: 0.5}}"
    dataset = load(tmp_path, f"train_loader: {{dataset: {{streams: {streams}}}}}\n").train_loader.dataset
    assert dataset.local is None
    assert {name: stream.local for name, stream in dataset.streams.items()} == {"wiki": "w", "c4": "c"}


def test_run_name(tmp_path, monkeypatch):
    assert load(tmp_path, "save_folder: out/${run_name}\n").save_folder == "out/small"
    monkeypatch.setenv("COMPOSER_RUN_NAME", "from-env")
    assert load(tmp_path, "run_name:\n").run_name == "from-env"
    assert load(tmp_path, "run_name: mine\n").run_name == "mine"


def test_another_mixer_replaces_the_inherited_one(tmp_path):
    assert load(tmp_path).model.mixer == {"name": "hydra", "d_state": 16}
    assert load(tmp_path, "", "model.mixer.expand=4").model.mixer == {
        "name": "hydra",
        "d_state": 16,
        "expand": 4,
    }
    attention = load(tmp_path, "model: {mixer: {name: attention, num_heads: 4}}\n")
    assert attention.model.mixer == {"name": "attention", "num_heads": 4}
    assert attention.model.model_config["hidden_size"] == 32


def test_inherited_entries_are_cleared(tmp_path):
    text = "callbacks: {lr_monitor: {}, speed_monitor: {window_size: 5}}\nalgorithms: {gradient_clipping: {}}\n"
    config = load(tmp_path, text, "callbacks.lr_monitor=false", "algorithms.gradient_clipping.clipping_threshold=1.0")
    assert config.callbacks == {"speed_monitor": {"window_size": 5}}
    assert config.algorithms == {"gradient_clipping": {"clipping_threshold": 1.0}}
    assert load(tmp_path, text, "callbacks=null").callbacks == {}
    assert load(tmp_path, "loggers:\n  # wandb: {project: p}\n").loggers == {}


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (
            "train_loader: {dataset: {shufle: yes}}\n",
            "",
            "small.yaml: train_loader.dataset.shufle: unknown key; did",
        ),
        ("", "optimizer.lrr=1", "command line: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("lr: 5e-4\n", "", "small.yaml: lr: unknown key; did you mean 'optimizer.lr'?"),
        (
            "global_train_batch_size: 4k\n",
            "",
            "small.yaml: global_train_batch_size: expected a whole number, got '4k'",
        ),
        (
            "max_duration: 1e6\n",
            "",
            "small.yaml: max_duration: expected text, got 1000000.0; put it in quotes",
        ),
        ("callbacks: none\n", "", "small.yaml: callbacks: expected a mapping (key: value), got 'none'"),
        ("optimizer:\n", "", "small.yaml: optimizer: expected a mapping (key: value), got null"),
        (
            "eval_loader: {shuffle: no}\n",
            "",
            "small.yaml: eval_loader.shuffle: unknown key; did you mean 'eval_loader.d",
        ),
        ("", "tokenizer_name=???", "command line: tokenizer_name: must be set"),
        ("", "max_duration=soon", "command line: max_duration: "),
        ("", "max_seq_len=0", "command line: max_seq_len: 0 must be at least 1"),
        ("mlm_probability: 30\n", "", "small.yaml: mlm_probability: 30.0 must lie between 0 and 1"),
        ("eval_loader: {name: texts}\n", "", "small.yaml: eval_loader.name: unknown loader 'texts'"),
        (
            "",
            "train_loader.dataset.shuffle_algo=py9",
            "command line: train_loader.dataset.shuffle_algo: unknown",
        ),
        ("", "model.mixer.expnd=4", "command line: model.mixer.expnd: unknown key; did you mean 'expand'?"),
        (
            "",
            "model.mixer.name=hidra",
            "command line: model.mixer.name: unknown mixer 'hidra'; did you mean 'hydra'?",
        ),
        (
            "model: {model_config: {hiden_size: 4}}\n",
            "",
            "small.yaml: model.model_config.hiden_size: unknown key",
        ),
        ("autoresume: true\n", "", "small.yaml: autoresume: needs save_folder"),
        (
            "model: {tokenizer_name: bert-base-uncased}\n",
            "",
            "small.yaml: model.tokenizer_name: 'bert-base-uncased' is not the tokenizer_name of the run, "
            "'my-data/tokenizer'; remove the key, or write tokenizer_name: ${tokenizer_name}",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_with_file_and_key(tmp_path, text, override, message):
    assert failure(tmp_path, text, *filter(None, [override])).startswith(message)


CAUSAL = "model: {name: causal_lm, mixer: attention}\n"


def test_a_causal_model_predicts_every_next_token(tmp_path):
    config = load(tmp_path, CAUSAL)
    assert config.train_loader.dataset.masking == config.eval_loader.dataset.masking == "causal_lm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CAUSAL + "masking: bert\n", "masking: 'bert' does not fit model.name: causal_lm; choose causal_lm"),
        ("masking: causal_lm\n", "masking: 'causal_lm' does not fit model.name: mixer_bert; choose another"),
        ("model: {name: causal_lm, mixer: hydra}\n", "model.mixer.name: 'hydra' lets tokens see later ones"),
    ],
)
def test_objective_and_model_must_fit(tmp_path, text, message):
    assert message in failure(tmp_path, text)


def test_tokenizer_name_has_no_default(tmp_path):
    path = tmp_path / "bare.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"bare\.yaml: tokenizer_name: must be set"):
        load_config(path)


def test_the_resolved_configuration_reads_back_equal(tmp_path):
    config = load(
        tmp_path,
        "optimizer: {lr: 1e-5}\nscheduler: {alpha_f: 0.02}\nloggers: {file_logger: {}}\n"
        "train_loader: {dataset: {streams: {wiki: {local: w}}}}\nparallelism_config: {fsdp: {}}\n"
        "device_train_microbatch_size: 16\n",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert "${" not in path.read_text()


@pytest.mark.parametrize(
    "setting, reason",
    [
        ("hidden_dropout_prob=2", "2.0 is no probability"),
        ("layer_dropout_prob=-0.1", "-0.1 is no probability"),
        ("initializer_range=-1", "-1.0 is negative"),
        ("type_vocab_size=-1", "-1 is negative"),
    ],
)
def test_numbers_that_no_model_can_have_are_named(tmp_path, setting, reason):
    key = setting.partition("=")[0]
    assert failure(tmp_path, "", f"model.model_config.{setting}").endswith(f"model.model_config.{key}: {reason}")
