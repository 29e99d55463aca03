"""Read the files of a tokenizer: a folder, a `tokenizer.json`, or a tokenizer of the Hub."""

from pathlib import Path

import tokenizers

from pretrain_lib.data.text.same_ids import has_gpt2_shape, has_same_ids
from pretrain_lib.data.text.tokenizer_parts import part_steps
from pretrain_lib.files.reading import interpreting, read_object
from pretrain_lib.values import show
from pretrain_lib.wording import in_line

END_OF_TEXT = "<|endoftext|>"
TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
MODEL, SPECIAL = "config.json", "special_tokens_map.json"
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
RUN_FILES = "training/files.json"  # of a checkpoint: it names what the run has written
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # they take tokenizer.json as is
PLAIN_MODELS = (None, "gpt2", "llama", "qwen3")  # for which transformers takes the class named
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_backend(name: str | Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """Return a tokenizer and its end-of-text token, None where no file names one.

    What the files beside it change is left to `transformers`, so that the ids are those it gives;
    in a checkpoint of a run, they are those of training, whatever the family of the model.
    """
    path = Path(name).expanduser()
    if path.name == TOKENIZER and path.is_file():
        path = path.parent  # the files beside it belong to it
    if path.is_file():
        return _read(path), _declared_end(path.parent)
    if not path.is_dir():
        return _load_from_hub(str(name))
    if is_of_run(path):
        return _read(path / TOKENIZER), _declared_end(path)
    if (path / TOKENIZER).is_file():
        return _as_transformers(_read(path / TOKENIZER), path)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _as_transformers(_read_merges(path), path, usual=END_OF_TEXT)
    raise ValueError(
        f"data.tokenizer={name}: the folder needs tokenizer.json, or vocab.json and merges.txt"
    )


def is_of_run(folder: Path) -> bool:
    """Return whether a folder is a checkpoint with the tokenizer that its run trained with."""
    return TOKENIZER in _settings(folder / RUN_FILES)


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
        raise ValueError(
            f"data.tokenizer={path} is not a tokenizer.json: {in_line(error)}"
        ) from error


def _read_merges(folder: Path) -> tokenizers.Tokenizer:
    """Read `vocab.json` and `merges.txt` as those of GPT-2."""
    try:
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        return byte_level(tokenizers.models.BPE.from_file(*files))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(
            f"data.tokenizer={folder}: vocab.json and merges.txt are not those of a BPE: "
            f"{in_line(error)}"
        ) from error


def _as_transformers(
    own: tokenizers.Tokenizer, folder: Path, *, usual: str | None = None
) -> tuple[tokenizers.Tokenizer, str | None]:
    """Return a tokenizer as the files beside it make it, and its end, by default `usual`.

    What transformers makes of them is asked only where it may differ: its import takes seconds.
    """
    end = _declared_end(folder) or usual
    if _is_taken_as_is(own, folder) and not _is_changed(own, folder, end):
        return own, end
    loaded, end = _load_with_transformers(folder)
    has_end = (end or usual) is None or own.token_to_id(end or usual) is not None
    return (own if has_end and has_same_ids(own, loaded) else loaded), end


def _is_taken_as_is(own: tokenizers.Tokenizer, folder: Path) -> bool:
    """Return whether transformers builds no other tokenizer for the class named beside it."""
    config = _settings(folder / MODEL)
    model = config.get("model_type")
    kind = _settings(folder / CONFIG).get("tokenizer_class") or config.get("tokenizer_class")
    is_whole = (folder / TOKENIZER).is_file()
    if is_whole and (kind in PLAIN_CLASSES or kind is model is None):
        return model in PLAIN_MODELS
    return kind in GPT2_CLASSES and model in (None, "gpt2") and has_gpt2_shape(own)


def _is_changed(backend: tokenizers.Tokenizer, folder: Path, end: str | None) -> bool:
    """Return whether the files beside a tokenizer change the ids of a text, or add its end."""
    added = [token.__getstate__() for token in backend.get_added_tokens_decoder().values()]
    named = _named_tokens(backend, folder)
    prefix = _settings(folder / CONFIG).get("add_prefix_space")
    return (
        any(not token.special and token.__getstate__() not in added for token in named)
        or any(token.content == end and backend.token_to_id(end) is None for token in named)
        or any(
            step["type"] == "ByteLevel" and prefix not in (None, step["add_prefix_space"])
            for step in part_steps(backend.pre_tokenizer)[:1]
        )
    )


def _named_tokens(backend: tokenizers.Tokenizer, folder: Path) -> list[tokenizers.AddedToken]:
    """Return the tokens that the files beside a tokenizer add to it, as `transformers` does."""
    settings = _token_settings(folder)
    if "added_tokens_decoder" in settings:
        with interpreting(folder / CONFIG):
            return [
                tokenizers.AddedToken(t["content"], **{k: t[k] for k in FLAGS if k in t})
                for t in settings["added_tokens_decoder"].values()
            ]
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    marks = [mark for key, mark in settings.items() if key.endswith("_token")]
    special = [mark.get("content") if isinstance(mark, dict) else mark for mark in marks]
    return [
        tokenizers.AddedToken(name, special=name in special, normalized=name not in special)
        for name in _settings(folder / ADDED)
        if name not in contents
    ]


def _settings(path: Path) -> dict:
    """Return the object in a JSON file, empty without one."""
    return read_object(path) if path.is_file() else {}


def _token_settings(folder: Path) -> dict:
    """Return the settings of a tokenizer's tokens, as transformers joins them from two files."""
    settings = _settings(folder / CONFIG)
    if "added_tokens_decoder" in settings:
        return settings
    return settings | _settings(folder / SPECIAL)


def _declared_end(folder: Path) -> str | None:
    token = _token_settings(folder).get("eos_token")
    token = token.get("content", token) if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise ValueError(f"{folder}: eos_token={show(token)} of {CONFIG} or {SPECIAL} must be text")
    return token


def _load_with_transformers(folder: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return _backend_of(loaded), loaded.eos_token
    except Exception as error:  # transformers raises many types
        raise ValueError(
            f"data.tokenizer={folder}: {TOKENIZER} is missing or may lack what {CONFIG}, {ADDED} "
            f"or {MODEL} say, and transformers does not load the folder ({show(error)}); load the "
            f"tokenizer where it can be, save it with save_pretrained, which writes a whole "
            f"{TOKENIZER}, and set tokenizer_class to {PLAIN_CLASSES[0]} in its {CONFIG}"
        ) from error


def _backend_of(loaded: object) -> tokenizers.Tokenizer:
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TypeError(f"{type(loaded).__name__} is not one of the tokenizers library")
    return backend


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
