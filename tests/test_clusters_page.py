"""The commands that docs/clusters.md shows are understood by what they start."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anymixer.config import load_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text()


def commands(word):
    """The commands of the page that begin with a word, continued lines joined, variables as the page sets them (others
    as 7)."""
    text = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ")
    values = dict(re.findall(r"(\w+)=([^$\s]\S*)", " ".join(re.findall(r"^export (.*)$", text, flags=re.MULTILINE))))
    text = re.sub(r"\$\(\([^)]*\)\)", "7", text)
    text = re.sub(r"\$(\w+)", lambda name: values.get(name[1], "7"), text)
    found = re.findall(rf"(?:^|')({word} [^'\n]*)", text, flags=re.MULTILINE)
    return [shlex.split(command) for command in found]


def check_run(arguments):
    file, *overrides = [argument for argument in arguments if not argument.startswith("--")]
    return load_config(ROOT / file, overrides)


def test_the_page_shows_what_is_tested():
    assert [len(commands(word)) for word in ("composer", "torchrun", "python")] == [3, 2, 2]


def test_composer_understands_its_commands():
    launcher = pytest.importorskip("composer.cli.launcher")
    for command in commands("composer"):
        parsed = launcher._get_parser().parse_args(command[1:])
        assert parsed.nproc == 8 and parsed.training_script == "main.py"
        check_run(parsed.training_script_args)


def test_torchrun_understands_its_commands():
    run = importlib.import_module("torch.distributed.run")
    for command in commands("torchrun"):
        parsed = run.parse_args(command[1:])
        assert parsed.nproc_per_node == "8" and parsed.training_script == "main.py"
        check_run(parsed.training_script_args)


def test_the_shards_of_s3_are_cached_with_a_limit(call_main, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = [command for command in commands("python") if command[1] == "main.py"]
    assert call_main(*command[2:]) == 0
    assert "cache_limit: 200gb" in capsys.readouterr().out


def test_the_benchmark_understands_its_command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    (command,) = [command for command in commands("python") if command[1] == "benchmarks/scaling.py"]
    monkeypatch.setattr(sys, "argv", command[1:])
    assert importlib.import_module("scaling").parse_arguments().ranks == [1, 2, 4, 8]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_batch_script_is_one():
    (script,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
