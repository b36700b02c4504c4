"""Uploads an exported folder to the Hugging Face Hub."""

from pathlib import Path

from anymixer.errors import UserError


def check_push(repository: str) -> None:
    """Raise UserError, before any work, for a name that the Hub does not take or when nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push: {' '.join(str(error).split())}") from error
    if get_token() is None:
        raise UserError("--push: not logged in to the Hub; run `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, repository: str) -> str:
    """Upload `folder`, making the repository, a private one, where there is none; return its address.

    Raises UserError when the Hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the exported model")
    except Exception as error:  # each version of the Hub's client raises classes of another library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push: {repository}: {reason}; the folder is in {folder}: `hf upload {repository} {folder}` tries again"
        ) from error
    return f"https://huggingface.co/{repository}"
