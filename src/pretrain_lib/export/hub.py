"""Upload an export to the Hugging Face Hub."""

from pathlib import Path

from pretrain_lib.wording import in_line


def check_hub(name: str) -> None:
    """Raise ValueError for an invalid repository name, a missing token, or offline mode."""
    from huggingface_hub import constants, get_token
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


def push_to_hub(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as one commit, creating the repository if necessary; return its URL.

    `private` applies only to a new repository. Raises ValueError if the upload fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message="Upload by pretrain_lib"
        )
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        text, flag = in_line(error), " --private" * private
        raise ValueError(
            f"push_to_hub={name}: the upload of {folder} failed ({text}); the folder is complete: "
            f"check the network and the token's permissions, then run "
            f"`hf upload {name} {folder}{flag}`"
        ) from error
    return str(created)
