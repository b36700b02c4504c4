"""A corpus and a run that are small enough for the tests of whole programs."""

import contextlib
import importlib.util
import itertools
import os
import random
import re
import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; it must know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
WORDS = ["the", "a", "cat", "dog", "house", "tree", "sees", "likes", "finds", "old", "young", "red", "with"]
RUN = """\
run_name: {name}
data_local: {data}
tokenizer_name: {data}/tokenizer
max_seq_len: 32
model:
  mixer: {mixer}
  model_config: {{vocab_size: 300, hidden_size: 16, num_hidden_layers: 2, hidden_dropout_prob: 0.0}}
optimizer: {{lr: 0.01}}
global_train_batch_size: 8
max_duration: 4ba
eval_interval: 0
save_folder: {folder}/{name}
save_interval: 2ba
autoresume: true
train_loader: {{num_workers: 0}}
eval_loader: {{num_workers: 0}}
eval_subset_num_batches: 1
device: cpu
progress_bar: false
"""


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """A test's numbers do not depend on which tests ran before it in this process, which is a matter of timing."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """Shards of 32-token rows of a few hundred short documents, with the tokenizer trained on them."""
    from data_prep.convert import ConvertOptions, convert

    folder = tmp_path_factory.mktemp("tiny_corpus")
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(WORDS), (20,), generator=g).tolist() for _ in range(300)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(WORDS[i] for i in row) + "." for row in rows))
    out = folder / "mds"
    options = {"input": (folder / "text.txt",), "out_root": out, "train_tokenizer": 300, "concat_tokens": 32}
    convert(ConvertOptions(dataset="text", val_fraction=0.1, **options))
    return out


@pytest.fixture(scope="session")
def write_run(tiny_corpus):
    """Write the YAML file of a run of four steps into a folder, where it will save too; returns its path."""

    def write(folder, name, mixer="{name: hydra, d_state: 4, headdim: 8}", **more):
        lines = "".join(f"{key}: {value}\n" for key, value in more.items())
        text = RUN.format(name=name, data=tiny_corpus, mixer=mixer, folder=folder)
        sections = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
        kept = [section for section in sections if section.partition(":")[0] not in more]
        path = Path(folder) / f"{name}.yaml"
        path.write_text("".join(kept) + lines)
        return path

    return write


@pytest.fixture(scope="session")
def call_main():
    """main.py in this process: call with its arguments, get its exit code."""
    from anymixer.entry_point import run

    spec = importlib.util.spec_from_file_location("main_under_test", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: run(module.main, [str(a) for a in arguments])


@pytest.fixture
def call_cli(monkeypatch):
    """The `anymixer` command in this process: call with its arguments, get its exit code."""
    from anymixer.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["anymixer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code or 0

    return call


@pytest.fixture
def child_environment(monkeypatch):
    """Processes that a test starts find this checkout and use one thread."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# Ports below those that the system hands out by itself, from somewhere else on in each process that tests.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
_PORTS = itertools.count(random.SystemRandom().randrange(_LAST_PORT - _FIRST_PORT))


@pytest.fixture
def master_port():
    """A port for ranks to meet at, which no other test is given: the first rank takes it only when it has imported
    everything, and until then another would find it free."""
    for port in (_FIRST_PORT + number % (_LAST_PORT - _FIRST_PORT) for number in _PORTS):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


@pytest.fixture(scope="session")
def s3_endpoint():
    """URL of a local S3 server."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3_client(s3_endpoint, monkeypatch):
    """A client of the local S3 server, which is empty, and which the programs under test talk to."""
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "S3_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    yield boto3.client("s3", endpoint_url=s3_endpoint)
    urllib.request.urlopen(f"{s3_endpoint}/moto-api/reset", data=b"").close()


@pytest.fixture
def forget_own_mixers():
    """Leave the registry and the modules as they were, whatever files of mixers a test loads."""
    from anymixer.mixers import mixers

    names, modules = set(mixers.names()), set(sys.modules)
    yield
    for name in set(mixers.names()) - names:
        mixers.unregister(name)
    for name in set(sys.modules) - modules:
        if name.startswith(("anymixer_user_", "my_")):
            del sys.modules[name]
