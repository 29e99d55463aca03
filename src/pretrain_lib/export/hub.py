"""Upload an export to the Hugging Face Hub."""

import shlex
from pathlib import Path

from pretrain_lib.export.export import VARYING
from pretrain_lib.wording import in_line


def check_hub(name: str) -> None:
    """Raise ValueError for an invalid repository name, a missing or wrong token, or no network."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={name} must be OWNER/NAME: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub={name}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise ValueError(
            f"push_to_hub={name} needs a token: set HF_TOKEN, or log in with `hf auth login`"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        raise ValueError(
            f"push_to_hub={name}: the hub has not accepted the token ({in_line(error)}): check the "
            f"network, and HF_TOKEN or the login of `hf auth login`"
        ) from error


def push_to_hub(folder: Path, name: str, *, private: bool) -> str:
    """Upload an export as one commit, creating the repository if necessary; return its URL.

    Files of an earlier export that this one does not have are removed: a single file of weights
    would be loaded in place of several. `private` applies only to a new repository. Raises
    ValueError if the upload fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message="Upload by pretrain_lib",
            delete_patterns=list(VARYING),
        )
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        command = ["hf", "upload", name, str(folder), *["--private"] * private]
        command += [word for pattern in VARYING for word in ("--delete", pattern)]
        raise ValueError(
            f"push_to_hub={name}: the upload of {folder} failed ({in_line(error)}); the folder is "
            f"complete: check the network and the token's permissions, then run "
            f"`{shlex.join(command)}`"
        ) from error
    return str(created)
