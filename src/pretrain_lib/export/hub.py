"""An export uploaded to the Hugging Face hub."""

from pathlib import Path


def check_hub(name: str) -> None:
    """Raise ValueError unless `name` can name a repository and there is a token and a network."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={name} is no OWNER/NAME: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub={name}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise ValueError(
            f"push_to_hub={name} needs a token: set HF_TOKEN, or log in with `hf auth login`"
        )


def push_to_hub(folder: Path, name: str, *, private: bool) -> str:
    """Upload all of a folder as one commit, to a repository that is made if there is none.

    Returns its address. `private` is for a repository that is made now. Raises ValueError where the
    hub is out of reach or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message="Upload by pretrain_lib"
        )
    except Exception as error:  # the hub's client raises many kinds, and its HTTP library more
        text = " ".join(str(error).split())
        raise ValueError(
            f"push_to_hub={name}: the upload of {folder} failed ({text}); the folder is whole: "
            f"see to the network or the token's rights, then run `hf upload {name} {folder}`"
        ) from error
    return str(created)
