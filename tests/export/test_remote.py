"""Checkpoints in an S3 bucket, served by a local server, and on a web server."""

import functools
import http.server
import threading

import pytest
import torch

from anymixer.errors import UserError
from anymixer.export.source import open_checkpoint

pytest.importorskip("composer")


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_run, call_main):
    folder = tmp_path_factory.mktemp("runs")
    assert call_main(write_run(folder, "tiny")) == 0
    return folder / "tiny"


@pytest.fixture
def client(s3_client):
    """An S3 client, with a bucket called `runs`."""
    s3_client.create_bucket(Bucket="runs")
    return s3_client


def upload(client, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            client.upload_file(str(path), "runs", f"{prefix}/{path.relative_to(folder)}")


def test_a_run_in_a_bucket_is_the_run(run, client, tmp_path):
    from torch.distributed import checkpoint

    upload(client, run, "some/tiny")
    here, whole = open_checkpoint("s3://runs/some/tiny"), open_checkpoint(str(run))
    one = open_checkpoint("s3://runs/some/tiny/ep0-ba2-rank0.pt")
    assert (here.step(), one.step(), here.file.name) == (4, 2, "ep0-ba4-rank0.pt")
    assert (here.folder / "metrics.jsonl").is_file() and here.run == whole.run
    assert all(torch.equal(here.weights[name], whole.weights[name]) for name in whole.weights)

    content = torch.load(run / "latest-rank0.pt", weights_only=False)["state"]
    kept = {key: content[key] for key in ("model", "integrations", "callbacks", "timestamp")}
    checkpoint.save({"state": kept}, checkpoint_id=tmp_path / "ep0-ba9", no_dist=True)
    upload(client, tmp_path, "sharded")
    for url in ("s3://runs/sharded", "s3://runs/sharded/ep0-ba9"):
        shards = open_checkpoint(url)
        assert all(torch.equal(shards.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://runs/nowhere", "no checkpoint is there"),
        ("s3://runs/nowhere/a.pt", "there is no such file"),
        ("s3://no-bucket/tiny", "cannot be listed"),
        ("ftp://runs/tiny", "no object store of that kind"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(url, message, client):
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(url)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_on_a_web_server(run, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(run)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert open_checkpoint(f"{address}/latest-rank0.pt").step() == 4
        with pytest.raises(UserError, match="there is no such file"):
            open_checkpoint(f"{address}/absent.pt")
    finally:
        server.shutdown()
