"""Uploading an exported folder, to a Hub that is played by the test."""

import pytest

from anymixer.errors import UserError
from anymixer.export.push import check_push, push_folder


class Hub:
    """Keeps what it is told."""

    def __init__(self, refuses=False):
        self.calls, self.refuses = [], refuses

    def create_repo(self, repository, **options):
        if self.refuses:
            raise OSError("403 Forbidden\nsecond line")
        self.calls.append((repository, options))

    def upload_folder(self, **options):
        self.calls.append(options)


def test_a_private_repository_receives_the_folder(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert push_folder(tmp_path, "me/model") == "https://huggingface.co/me/model"
    (repository, options), uploaded = hub.calls
    assert repository == "me/model" and options == {"private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/model" and uploaded["folder_path"] == tmp_path


def test_a_refusal_is_one_line_that_says_how_to_try_again(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(refuses=True))
    with pytest.raises(UserError, match=r"--push: me/model: 403 Forbidden; .* `hf upload me/model") as caught:
        push_folder(tmp_path, "me/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("a b/c", "--push: Repo id must"), ("me/model", "not logged in")])
def test_mistakes_are_found_before_any_work(name, message, monkeypatch, call_cli, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=message):
        check_push(name)
    assert call_cli("export", tmp_path / "no-run", tmp_path / "out", "--push", name) == 2
    assert "--push" in capsys.readouterr().err
