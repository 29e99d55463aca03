"""Read the files of a tokenizer: a folder, a `tokenizer.json`, or a tokenizer of the Hub."""

import json
from pathlib import Path

import tokenizers

END_OF_TEXT = "<|endoftext|>"


def read_backend(name: str | Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """Return a tokenizer and its end-of-text token, None where no file names one."""
    path = Path(name).expanduser()
    if path.is_file():
        return _read(path), None
    if not path.is_dir():
        return _load_from_hub(str(name))
    if (path / "tokenizer.json").is_file():
        return _read(path / "tokenizer.json"), _declared_end(path)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        model = tokenizers.models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
        return byte_level(model), END_OF_TEXT
    raise ValueError(
        f"data.tokenizer={name}: the folder needs tokenizer.json, or vocab.json and merges.txt"
    )


def byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """Return a tokenizer with the words and bytes of GPT-2."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"data.tokenizer={path} is not a tokenizer.json: {error}") from error


def _declared_end(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8-sig")).get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{config} is broken: it must say eos_token ({error})") from error
    if not isinstance(token, str | None):
        raise ValueError(f"{config}: eos_token={token!r} must be text")
    return token


def _load_from_hub(name: str) -> tuple[tokenizers.Tokenizer, str | None]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers and huggingface_hub raise many types
        raise ValueError(
            f"data.tokenizer={name} is not a local file or folder and could not be loaded from the "
            f"Hugging Face Hub; without a network, give a folder or a tokenizer.json, or train a "
            f"tokenizer with --data.train_tokenizer VOCABULARY"
        ) from error
    return loaded.backend_tokenizer, loaded.eos_token
