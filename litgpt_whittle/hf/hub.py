"""Upload an exported directory to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from litgpt_whittle.errors import UserError


def check_hub(name: str) -> None:
    """Check the name of a repository, and that the Hub knows the user.

    Raises:
        UserError: If the name is invalid, if there is no valid token, or if the Hub cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub must be a repository such as 'user/model', got {name!r} ({_first_line(error)})"
        ) from None
    try:
        HfApi().whoami()
    except Exception as error:  # types of errors differ between versions of huggingface_hub
        _refuse(error, "log in by `hf auth login` or set HF_TOKEN, and check the network")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a directory to a repository, which is created if it does not exist.

    Args:
        folder: The directory.
        name: The repository, such as "user/model".
        private: If true, a new repository is private.

    Returns:
        The repository's address.

    Raises:
        UserError: If the Hub rejects the repository or the upload, or cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by litgpt export")
    except Exception as error:
        _refuse(error, f"{str(folder)!r} is complete; upload it by `hf upload {name} {folder}`")
    return str(address)


def _refuse(error: Exception, remedy: str) -> NoReturn:
    raise UserError(f"the Hugging Face Hub refused ({type(error).__name__}: {_first_line(error)}); {remedy}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
