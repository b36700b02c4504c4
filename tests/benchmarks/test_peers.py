"""The benchmarks of blocks, decoding, packed rows, whole steps and loss curves, each in small."""

import functools
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from mamba_ssm_stand_in import mamba_ssm  # noqa: F401
from triton_cases import needs_triton

from anymixer.errors import UserError
from anymixer.mixers.s6 import S6
from anymixer.report.comparison import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch):
    """A benchmark by its name, on a machine whose ceilings are known."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    timing = importlib.import_module("timing")
    monkeypatch.setattr(timing, "ceilings", lambda device: {"matmul_tflops": 0.05, "copy_gbs": 10.0})
    return importlib.import_module


def test_blocks_and_their_peers(program, tmp_path, capsys, mamba_ssm):  # noqa: F811
    mixers = program("mixers")
    names = ["hydra", "hydra-mamba_ssm", "ssd", "ssd-mamba_ssm", "toeplitz-di"]
    arguments = ["--mixers", *names, "--lengths", "8", "32", "--tokens", "16", "--d-model", "64", "--repeat", "1"]
    written = {"--markdown": tmp_path / "blocks.md", "--plot": tmp_path / "blocks.png"}
    mixers.main([*arguments, *(str(part) for pair in written.items() for part in pair)])
    assert mamba_ssm
    lines = [line.split(" | ") for line in (tmp_path / "blocks.md").read_text().splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == 2 * ["attention", *names]
    assert all(line[4] == "1.00" for line in lines if line[0] == "| attention")
    assert "hydra is faster than attention" in capsys.readouterr().out
    assert (tmp_path / "blocks.png").stat().st_size > 1000


def test_decoding_reads_one_context_for_all_rows(program, tmp_path, capsys, monkeypatch):
    decode = program("decode")
    read, prefill = [], S6.prefill
    monkeypatch.setattr(S6, "prefill", lambda self, hidden: read.append(tuple(hidden.shape)) or prefill(self, hidden))
    size = ["--d-model", "16", "--batch", "3", "--contexts", "4", "9", "--repeat", "1", "--rounds", "1"]
    monkeypatch.setattr(decode, "OPTIONS", {"attention": {"num_heads": 2}})
    monkeypatch.setattr("sys.argv", ["decode.py", "--mixers", "s6", *size, "--markdown", str(tmp_path / "a.md")])
    decode.main()
    printed = capsys.readouterr().out
    assert read == [(1, 4, 16), (1, 9, 16)]
    # keys and values of 16 numbers a token; 32 channels of 16 states and of 3 inputs of the convolution
    kilobytes = {"attention": ["0.5", "1.2"], "s6": ["2.4", "2.4"]}
    for name, state in kilobytes.items():
        (line,) = [line for line in (tmp_path / "a.md").read_text().splitlines() if line.startswith(f"| {name}")]
        assert line.strip("| ").split(" | ")[3:] == state
        assert f"  {'  '.join(state)}\n" in printed


def test_peers_that_cannot_run_are_left_out_or_refused(program, capsys):
    mixers = program("mixers")
    device = torch.device("cpu")
    assert not {*mixers.PEERS} & {*mixers.chosen(None, device)}
    assert "without hydra-mamba_ssm" in capsys.readouterr().out
    with pytest.raises(UserError, match="--mixers: hydra-mamba_ssm: mamba-ssm does not run on 'cpu'"):
        mixers.chosen(["hydra-mamba_ssm"], device)
    steps = program("train_step")
    with pytest.raises(UserError, match="--peers: mamba_ssm: mamba-ssm does not run on 'cpu'"):
        steps.main(["yamls/demo/hydra.yaml", "--peers", "mamba_ssm"])


def test_a_block_that_does_not_fit_is_no_end(program, monkeypatch, tmp_path):
    mixers = program("mixers")

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(mixers, "bench_block", full)
    mixers.main(["--mixers", "hydra", "--lengths", "8", "--markdown", str(tmp_path / "full.md")])
    assert (tmp_path / "full.md").read_text().count("| 8 | out of memory |") == 2


def test_where_curves_cross(program):
    crossing = program("mixers").crossing
    lengths = [128, 1024, 8192]
    linear, quadratic = [5.0] * 3, [n / 512 for n in lengths]
    assert crossing(lengths, linear, quadratic) == pytest.approx(2560)
    assert crossing(lengths, [0.1] * 3, quadratic) == 128
    assert crossing(lengths, [100.0] * 3, quadratic) is None


def test_a_block_s_least_bytes(program):
    mixers = program("mixers")
    options = mixers.argparse.Namespace(tokens=16, repeat=1)
    times = mixers.bench_block("attention", 8, 32, options, torch.device("cpu"))
    # Read 32 and write 96, read 96 and write 32, read 32 and write 32: float32, and twice that backward.
    assert times.bytes == 16 * 4 * 3 * (32 + 96 + 96 + 32 + 32 + 32)
    assert times.flops == 16 * 6 * (32 * 96 + 32 * 32)


def test_packed_rows_are_full_of_documents(program):
    ids = program("packing").packed_rows(50, 300, 20)
    assert ids.shape == (50, 300) and bool((ids[:, 0] == 0).all())
    assert set(ids.diff(dim=1).unique().tolist()) == {0, 1}
    sizes = torch.cat([row.unique(return_counts=True)[1][:-1] for row in ids])
    assert int(sizes.min()) == 1 and int(sizes.max()) == 39 and 18.5 < float(sizes.float().mean()) < 21.5


def test_packed_against_fixed_rows(program, tmp_path):
    arguments = ["--tokens", "64", "--lengths", "16", "--d-model", "16", "--repeat", "1", "--mean-length", "4"]
    program("packing").main([*arguments, "--markdown", str(tmp_path / "packing.md")])
    assert "| hydra | 16 |" in (tmp_path / "packing.md").read_text()


def test_steps_and_the_models_to_compare_with(program, tmp_path, monkeypatch, capsys):
    steps = program("train_step")
    monkeypatch.setattr(
        steps, "measure", lambda step, device, **_: (step(), program("timing").Measurement(2.0, 0.0))[1]
    )
    arguments = ["yamls/demo/hydra.yaml", "--tokens", "64", "--lengths", "32", "--profile"]
    steps.main([*arguments, "--markdown", str(tmp_path / "steps.md")])
    text = (tmp_path / "steps.md").read_text()
    kinds = "kernels" if torch.cuda.is_available() else "operators"
    for name in ("attention baseline", "yamls/demo/hydra.yaml"):
        assert re.search(rf"one step of {name}, 32 tokens a row, eager: [\d.]+ ms of {kinds}: \S+ [\d.]+ ms \(", text)
    assert "| attention baseline |" in text
    assert "| yamls/demo/hydra.yaml | 1.8M | 32 | eager | 2.0 | 0.0320 | 1.00 |" in text
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--launch: graphs: needs a GPU"):
            steps.main(["yamls/demo/hydra.yaml", "--launch", "graphs"])
    options = steps.argparse.Namespace(files=["yamls/demo/hydra.yaml"], peers=["hf_bert", "modernbert"], lengths=[1024])
    with torch.device("meta"):
        sizes = {name: build() for name, (build, _) in steps.models(options, torch.device("cpu")).items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in sizes.items()}
    assert round(sizes["HF ModernBERT-base"] / 1e6, 1) == 149.7
    assert round(sizes["HF BERT-base"] / 1e6) == 110


def result(name, losses):
    curve = tuple({"step": step, "tokens": step, "loss": loss} for step, loss in enumerate(losses, 1))
    return Result(name, "", 1.0, 0.5, 1.0, 1, len(losses), 1, 1.0, 1, curve=curve)


@needs_triton
def test_kernels_of_ops_against_their_bytes(program, monkeypatch, capsys):
    kernels = program("hydra_kernels")
    sizes = {}

    def note(call, device):
        call()
        return program("timing").Measurement(1.0, 0.0)

    def noted(stages):
        for name, call, size in stages:
            sizes[name] = size
            yield name, call, size

    monkeypatch.setattr(kernels, "measure", note)
    monkeypatch.setattr(kernels, "CLASSES", 50)
    monkeypatch.setattr(kernels, "D_MODEL", 20)
    for name in ("cross_entropy", "add_norm"):
        stages = kernels.OPS[name]
        monkeypatch.setitem(kernels.OPS, name, lambda *a, stages=stages: noted(stages(*a)))
    kernels.main(["--ops", "cross_entropy", "add_norm", "--tokens", "10"])
    assert sizes == {
        "cross entropy": 3 * 50 * 2 + 3 * 4,
        "cross entropy backward": 2 * 3 * 50 * 2 + 3 * 4,
        "add_norm float32": 10 * 20 * (4 + 2 + 4) + 2 * 80,
        "add_norm float32 backward": 10 * 20 * (4 + 4 + 2 + 4 + 2) + 4 * 80,
        "add_norm bfloat16": 10 * 20 * 3 * 2 + 2 * 80,
        "add_norm bfloat16 backward": 10 * 20 * 5 * 2 + 4 * 80,
    }
    assert "add_norm bfloat16 backward  1.000  " in capsys.readouterr().out


def test_a_benchmark_that_is_cut_short_has_written_its_rows(program, tmp_path):
    timing = program("timing")
    keep = functools.partial(timing.write_markdown, tmp_path / "rows.md", ["model", "ms"], ["a machine"])
    rows = timing.told((["hydra", str(number)] for number in range(9)), keep)
    next(rows), next(rows)
    text = (tmp_path / "rows.md").read_text()
    assert "a machine" in text and "| hydra | 1 |" in text and "| hydra | 2 |" not in text


def test_how_far_loss_curves_are_apart(program):
    curves = program("loss_curves")
    one, other = [10.0 - 0.01 * i for i in range(100)], [10.0 - 0.01 * i for i in range(100)]
    other[3] += 0.5
    other[-1] -= 0.1
    cells = curves.compare_losses(result("a", one), result("b", other))
    assert cells[1:5] == ["100", "5.00e-01", "4", "6.00e-03"] and cells[-1] == "2.00e-03"
    assert cells[5] == "9.2550, 9.2530 (50)"
    assert curves.draw(result("a", one), result("b", other)).axes
    diverged = curves.compare_losses(result("a", one), result("b", [*other[:50], math.nan, *other[51:]]))
    assert diverged[2:4] == ["nan", "51"]
    with pytest.raises(UserError, match="not of the same steps"):
        curves.compare_losses(result("a", one), result("b", other[:-1]))


@pytest.mark.slow
def test_loss_curves_of_two_backends(program, tmp_path, write_run, child_environment):
    file = write_run(tmp_path, "tiny")
    program("loss_curves").main([str(file), "--backends", "reference", "torch", "--output", str(tmp_path / "curves")])
    row = (tmp_path / "curves" / "loss_curves.md").read_text().splitlines()[-1].split(" | ")
    assert row[:2] == ["| reference, torch", "4"] and float(row[2]) < 1e-4
    assert (tmp_path / "curves" / "loss_curves.png").stat().st_size > 1000
