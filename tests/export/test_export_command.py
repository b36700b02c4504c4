"""`anymixer export` from the folder of a run, from what is left of one, and from what is none."""

import errno
import functools
import json
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from anymixer.errors import UserError
from anymixer.export import export_checkpoint as command
from anymixer.export import verify
from anymixer.export.export_checkpoint import export_checkpoint
from anymixer.export.folder import build_exported, write_folder
from anymixer.export.source import open_checkpoint

pytest.importorskip("composer")


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_run, call_main):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("runs")
    assert call_main(write_run(folder, "tiny")) == 0
    return folder / "tiny"


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_becomes_a_folder_that_was_verified(run, tmp_path, call_cli, capsys):
    out = tmp_path / "model"
    assert call_cli("export", run, out, "--license", "mit", "--onnx") == 0
    printed = capsys.readouterr().out
    assert f"{out}: AutoModelForMaskedLM, loaded without anymixer" in printed and "of held-out text" in printed
    assert leftovers(tmp_path) == ["model"]
    for name in ("model.safetensors", "model.onnx", "config.json", "tokenizer.json", "README.md"):
        assert (out / name).is_file(), name
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "pipeline_tag: fill-mask" in card
    for text in (
        "after 4 training steps",
        "## Held-out text",
        "## Training data",
        "## Recipe",
        '"d_state": 4',
        "torch",
    ):
        assert text in card, text
    assert "![mixing matrices](mixing_matrices.png)" in card and (out / "mixing_matrices.png").is_file()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] != "TokenizersBackend"

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert call_cli("export", run, out) == 2
    assert (
        capsys.readouterr().err
        == f"error: {out}: it is there already, and is left as it is; name a folder that is not\n"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_gives_other_numbers_is_kept_aside(run, tmp_path, monkeypatch, call_cli, capsys):
    def write_wrong(model, folder):
        write_folder(model, folder)
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["head.norm.bias"] += 0.01
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(command, "write_folder", write_wrong)
    (tmp_path / "model.failed").mkdir()
    assert call_cli("export", run, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "its logits differ by 0.0" in error and "model.failed-2" in error
    assert leftovers(tmp_path) == ["model.failed", "model.failed-2"]


def without_verifying(monkeypatch):
    from anymixer.export.verify import Verdict

    monkeypatch.setattr(command, "verify", lambda expected, blocked: [Verdict(0.0, None)])


def test_a_checkpoint_alone_is_enough(run, tmp_path, monkeypatch):
    without_verifying(monkeypatch)
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "some.pt"
    shutil.copy(run / "latest-rank0.pt", file)
    found, whole = open_checkpoint(str(file)), open_checkpoint(str(run))
    assert found.step() == 4 and found.run == whole.run and found.made_with == whole.made_with
    assert found.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    export_checkpoint(str(file), tmp_path / "deep" / "model")
    assert (tmp_path / "deep" / "model" / "tokenizer.json").is_file()
    # Exported again, it is what it was.
    again = build_exported(open_checkpoint(str(tmp_path / "deep" / "model"))).model
    first = build_exported(found).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_the_folder_of_a_glue_job(run, tmp_path, monkeypatch):
    from anymixer.models import build_classifier
    from anymixer.models.model_config import ModelConfig

    without_verifying(monkeypatch)
    mixer = {"name": "hydra", "d_state": 4, "headdim": 8}
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
    model = build_classifier(ModelConfig(mixer=mixer, model_config=sizes), 3, pooling="mean")
    model.save_pretrained(tmp_path / "job" / "checkpoint")
    open_checkpoint(str(run)).tokenizer.save_pretrained(str(tmp_path / "job" / "checkpoint"))
    done = export_checkpoint(str(tmp_path / "job"), tmp_path / "model")
    assert done.auto_class == "AutoModelForSequenceClassification"
    assert "pipeline_tag: text-classification" in (tmp_path / "model" / "README.md").read_text()


def test_a_folder_of_shards(run, tmp_path):
    from torch.distributed import checkpoint

    content = torch.load(run / "latest-rank0.pt", weights_only=False)
    kept = {key: content["state"][key] for key in ("model", "integrations", "callbacks", "timestamp", "run_name")}
    (tmp_path / "sharded").mkdir()
    checkpoint.save({"state": kept}, checkpoint_id=tmp_path / "sharded" / "ep0-ba4", no_dist=True)
    found, whole = open_checkpoint(str(tmp_path / "sharded")), open_checkpoint(str(run))
    assert found.weights.keys() == whole.weights.keys()
    assert all(torch.equal(found.weights[name], whole.weights[name]) for name in whole.weights)
    assert found.run == whole.run and found.step() == 4
    assert found.tokenizer.get_vocab() == whole.tokenizer.get_vocab()


def half(file, folder):
    (folder / "half.pt").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder / "half.pt"


def other_architecture(file, folder):
    content = torch.load(file, weights_only=False)
    content["state"]["integrations"]["huggingface"]["model"]["config"]["content"]["num_hidden_layers"] = 3
    torch.save(content, folder / "other.pt")
    return folder / "other.pt"


def other_vocabulary(file, folder):
    content = torch.load(file, weights_only=False)
    content["state"]["integrations"]["huggingface"]["model"]["config"]["content"]["vocab_size"] = 304
    torch.save(content, folder / "other.pt")
    return folder / "other.pt"


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/anymixer-was-here", "w"))


def malicious(file, folder):
    torch.save({"state": {"model": {"model.a": torch.ones(1)}, "evil": Evil()}}, folder / "evil.pt")
    return folder / "evil.pt"


def nothing(file, folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def foreign(file, folder):
    torch.save({"state": {"model": {"model.a": torch.ones(1)}}}, folder / "foreign.pt")
    return folder / "foreign.pt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (half, "half.pt is not a whole checkpoint"),
        (other_architecture, "its weights do not fit MixerBertForMaskedLM: .* missing \\(bert.backbone.layers.2"),
        (
            other_vocabulary,
            "of another shape \\(bert.embeddings.word.weight: \\[300, 16\\] for the model's \\[304, 16\\]",
        ),
        (malicious, "evil.pt is refused"),
        (nothing, "no whole checkpoint is there"),
        (foreign, "does not say what model it is of"),
        (lambda file, folder: folder / "absent", "no such file or folder"),
    ],
)
def test_what_cannot_be_exported_leaves_one_line_and_nothing_else(make, message, run, tmp_path):
    (tmp_path / "in").mkdir()
    source = make((run / "latest-rank0.pt").resolve(), tmp_path / "in")
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(str(source), tmp_path / "model")
    assert "\n" not in str(caught.value) and leftovers(tmp_path) == ["in"]


def disk_full(model, folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.safetensors"))


def tensors_do_not_fit(model, folder):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def disk_full_in_torch(model, folder):
    try:
        disk_full(model, folder)
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("write", [disk_full, tensors_do_not_fit, disk_full_in_torch])
def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, write, call_cli, capsys):
    monkeypatch.setattr(command, "write_folder", write)
    out = tmp_path / "deep" / "er" / "model"
    assert call_cli("export", run, out) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: cannot be written: ") and "No space left on device" in error
    assert error.count("\n") == 1 and leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("room", [1_000, 100_000], ids=["for no code", "for no answer"])
def test_a_full_disk_under_the_process_that_verifies_is_one_line(run, tmp_path, monkeypatch, room, call_cli, capsys):
    """It writes to the temporary folder, whose disk may be another one than OUT's."""
    import resource

    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    limited = functools.partial(subprocess.run, preexec_fn=limit)
    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=limited))
    assert call_cli("export", run, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the process that verifies, in ") and "(TMPDIR), ended with 1" in error
    assert "File too large" in error and error.count("\n") == 1 and leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="model: cannot be made: Not a directory"):
        export_checkpoint(str(run), tmp_path / "file" / "model")


def test_a_folder_that_appears_meanwhile_is_not_touched(run, tmp_path, monkeypatch):
    out = tmp_path / "model"
    monkeypatch.setattr(command, "write_folder", lambda model, folder: (write_folder(model, folder), out.mkdir()))
    without_verifying(monkeypatch)
    with pytest.raises(UserError, match="model: it appeared meanwhile"):
        export_checkpoint(str(run), out)
    assert leftovers(tmp_path) == ["model"] and leftovers(out) == []


def test_a_name_that_transformers_cannot_load_from_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="a dot in its name; name it model_v1_0"):
        export_checkpoint(str(run), tmp_path / "model_v1.0")


def test_interrupted_it_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(str(run), tmp_path / "model")
    assert leftovers(tmp_path) == []


def test_inspect_says_what_a_checkpoint_is(run, call_cli, capsys):
    assert call_cli("inspect", run) == 0
    printed = capsys.readouterr().out
    assert zipfile.is_zipfile(run / "latest-rank0.pt")
    checkpoint = open_checkpoint(str(run))
    for text in (
        "MixerBertForMaskedLM",
        "transformers",
        "global_train_batch_size: 8",
        "d_state: 4",
        "bert.backbone.layers.1",
        "Hydra",
        f"{sum(p.numel() for p in build_exported(checkpoint).model.parameters()):,} parameters",
        "training loss",
    ):
        assert text in printed, text
    assert checkpoint.made_with["tokenizer_sha256"][:20] in printed.replace("\n", "")
    assert checkpoint.made_with["packages"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
