"""The Hugging Face hub, loaded by those alone who share files there."""

from pathlib import Path
from typing import Any

from narrowkv.errors import FileFormatError, OutputError

MISSING = "needs the package huggingface_hub; install it (`pip install huggingface_hub`), or name a local folder"


def download(repo_id: str, *files: str) -> Path:
    """The folder that a repository's files, or patterns of them, were read into.

    Raises FileFormatError where the hub gives none of that name.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FileFormatError(f"There is no folder {repo_id}, and to ask the hub for it {MISSING}.") from error
    try:
        return Path(snapshot_download(repo_id, allow_patterns=[*files]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileFormatError(
            f"There is no folder {repo_id}, and the hub gives none of that name ({reason}); name a local folder."
        ) from error


def upload(repo_id: str, folder: str, message: str, *, private: bool = False, token: str | None = None) -> str:
    """Put the files of a folder into a model repository, made if need be; returns the address of the commit."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise OutputError(f"Uploading {MISSING}.") from error
    api: Any = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
