"""The shape of any causal language model of transformers: the fields of its `config.json`."""

import difflib
import inspect
import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pretrain_lib.models.hf_config import parse_hf_config, read_hf_config
from pretrain_lib.quiet import without_warnings_of
from pretrain_lib.values import check_fields, did_you_mean, setting, show
from pretrain_lib.wording import in_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Fields that say where a configuration is from and how its weights are stored, not what it is.
NOT_THE_SHAPE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
SPELLED_ALIKE = 0.9  # of 1: unknown fields this close to one that is not given are misspelt
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class ConfigFields(dict):
    """Fields of a `config.json`; notations: a file, a folder, a name on the hub, or a mapping."""

    noun = "a config.json (a file, a folder or a name on the hub) or its fields {model_type: ...}"

    @classmethod
    def parse(cls, written: Any) -> "ConfigFields":
        """Read fields from text, or from a mapping whose values may be text, as YAML overlays have.

        Raises ValueError with a message that begins with `written`.
        """
        if isinstance(written, str) and not written.lstrip().startswith("{"):
            return cls(_without_origin(_read_named(written)))
        if isinstance(written, str):
            try:
                written = yaml.load(written, yaml.BaseLoader)
            except yaml.YAMLError as error:
                raise ValueError(f"{show(written)} must be {cls.noun}") from error
        return cls(_without_origin(_typed(written)))


@dataclass(frozen=True)
class CausalLMConfig:
    """A causal language model of transformers, described by its `config.json`."""

    config: ConfigFields = setting(
        ConfigFields(),
        "The config.json of any causal language model of transformers: a file, a folder, a name on "
        "the hub, or its fields.",
    )
    changes: ConfigFields = setting(
        ConfigFields(), "Fields to change in it, such as {num_hidden_layers: 4}."
    )

    def __post_init__(self) -> None:
        for name in ("config", "changes"):
            if not isinstance(getattr(self, name), ConfigFields):
                object.__setattr__(self, name, ConfigFields.parse(getattr(self, name)))
        check_fields(self, name="model")
        check_supported(self.fields)
        check_spelling(self.fields)
        check_one_model(self.hf)

    @property
    def fields(self) -> dict:
        """All fields, with the changes made."""
        return self.config | self.changes

    @property
    def key(self) -> str:
        """All fields as text, by which results that depend on them alone are remembered."""
        return json.dumps(self.fields, sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> "CausalLMConfig":
        """Return the configuration of a `key`."""
        return cls(config=json.loads(key))

    @cached_property
    def hf(self) -> "PreTrainedConfig":
        """The configuration of transformers; ids of special tokens beyond the vocabulary are unset.

        There is no id for padding: transformers would not train the embedding of that id. Raises
        ValueError for a family that needs one.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING

        fields = _with_infinities(self.fields)
        try:
            with without_warnings_of("transformers.configuration_utils"):  # of ids unset below
                hf = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        except (ValueError, TypeError, LookupError, ArithmeticError, StrictDataclassError) as error:
            reason = in_line(error)
            raise ValueError(f"model.config is refused by transformers: {reason}") from error
        for name in SPECIAL_TOKENS:
            id_ = getattr(hf, name, None)
            is_id = isinstance(id_, int) and 0 <= id_ < hf.get_text_config().vocab_size
            if name == "pad_token_id" or not is_id:
                unset_token(hf, name)
        return hf

    @property
    def model_type(self) -> str:
        """The family, by transformers' name, such as qwen3."""
        return self.hf.model_type

    @property
    def vocabulary_size(self) -> int:
        """Ids of the vocabulary."""
        return self.hf.vocab_size

    @property
    def padded_vocabulary_size(self) -> int:
        """The same: the vocabulary of these models is not padded."""
        return self.hf.vocab_size

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens, as lm-eval determines it.

        Raises ValueError for a configuration that names none, as that of a state-space model.
        """
        lengths = [getattr(self.hf, name, None) for name in CONTEXT_FIELDS]
        length = next((value for value in lengths if value is not None), None)
        if length is None:
            raise ValueError(
                f"model.config of model_type={self.model_type} names no longest sequence, which "
                f"evaluation needs: give one with --model.changes '{{{CONTEXT_FIELDS[0]}: 2048}}'"
            )
        return length

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return self.hf.num_hidden_layers

    @property
    def num_heads(self) -> int:
        """Attention heads of a block; those of a state-space model for one."""
        return getattr(self.hf, "num_attention_heads", None) or getattr(self.hf, "num_heads", 1)

    @property
    def width(self) -> int:
        """Length of a hidden state."""
        return self.hf.hidden_size

    def with_vocabulary_size(self, size: int) -> "CausalLMConfig":
        """Return the same model for another vocabulary."""
        return replace(self, changes=self.changes | {"vocab_size": size})


def unset_token(hf: "PreTrainedConfig", name: str) -> None:
    """Unset the id of a special token; one that begins or ends a text stays where it must be set.

    Raises ValueError if it is that of padding and must be set.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        setattr(hf, name, None)
    except StrictDataclassError as error:
        if name == "pad_token_id":
            raise needs_padding(hf.model_type) from error


def needs_padding(model_type: str) -> ValueError:
    """Return the error for a family that cannot do without an id for padding."""
    return ValueError(
        f"model.config: model_type={model_type} needs a pad_token_id, and transformers would not "
        f"train the embedding of that id; choose a family that needs none"
    )


def describe_hf(hf: "PreTrainedConfig") -> CausalLMConfig:
    """Return the settings that describe a configuration of transformers."""
    return CausalLMConfig(config=ConfigFields(_without_origin(json.loads(hf.to_json_string()))))


def check_supported(fields: dict) -> None:
    """Raise ValueError, naming the reason, for a configuration that cannot be trained here."""
    # These two, unlike the tables of names, have the classes that were registered.
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name, model_type = "model.config", fields.get("model_type")
    if model_type is None:
        raise ValueError(f"{name} names no model_type: give {ConfigFields.noun}")
    if model_type not in CONFIG_MAPPING:
        remote = "needs code from the hub, which is not run; it " if "auto_map" in fields else ""
        raise ValueError(
            f"{name}: model_type={show(model_type)} {remote}is unknown to the installed version of "
            f"transformers{did_you_mean(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}; register "
            f"one of your own with AutoConfig.register"
        )
    if fields.get("is_encoder_decoder"):
        raise ValueError(f"{name}: model_type={model_type} is an encoder-decoder, not supported")
    if fields.get("quantization_config"):
        raise ValueError(
            f"{name} describes quantized weights (quantization_config), which cannot be trained: "
            f"give the configuration of the model that was quantized"
        )
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name}: transformers has no causal language model for model_type={model_type}; "
            f"register one of your own with AutoModelForCausalLM.register"
        )


def check_spelling(fields: dict) -> None:
    """Raise ValueError for a field that is a misspelt one, which transformers keeps as it is.

    Other unknown fields are common: older names, and what other tools add.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[fields["model_type"]]
    names = {*_fields_of(kind), *kind.attribute_map}
    for name in sorted(fields.keys() - names):
        near = difflib.get_close_matches(name, names - fields.keys(), n=1, cutoff=SPELLED_ALIKE)
        if near:
            raise ValueError(
                f"model.config: {name} is no field of model_type={fields['model_type']}; did you "
                f"mean {near[0]}?"
            )


@cache
def _fields_of(kind: type) -> frozenset[str]:
    """Return the fields of a configuration of transformers, as far as it names them."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        defaults = kind().to_dict()
    except (ValueError, TypeError, StrictDataclassError):  # one without defaults
        defaults = {}
    return frozenset((*defaults, *inspect.signature(kind).parameters))


def check_one_model(hf: "PreTrainedConfig") -> None:
    """Raise ValueError for a configuration of several models, such as one that sees pictures."""
    if (text := hf.get_text_config()) is not hf:
        raise ValueError(
            f"model.config: model_type={hf.model_type} holds several models; give the fields of "
            f"its text model alone (text_config, model_type={text.model_type})"
        )


def _read_named(name: str) -> dict:
    """Return the `config.json` in a file, in a folder, or of a model on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return read_hf_config(path)
    if path.is_file():
        return parse_hf_config(path)
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{show(name)} is neither a file nor a folder, and the Hugging Face Hub has no "
            f"config.json of that name within reach ({reason})"
        ) from error
    return parse_hf_config(Path(file))


def _typed(written: Any) -> Any:
    """Return a value whose scalars may be text, such as "768" or "true", with their JSON types."""
    if isinstance(written, dict):
        return {key: _typed(value) for key, value in written.items()}
    if isinstance(written, list | tuple):
        return [_typed(item) for item in written]
    if not isinstance(written, str):
        return written
    try:
        return json.loads(written)
    except ValueError:
        return written


def _with_infinities(value: Any) -> Any:
    """Return a value with the numbers that transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(item) for key, item in value.items()}
    return [_with_infinities(item) for item in value] if isinstance(value, list) else value


def _without_origin(fields: dict) -> dict:
    return {key: value for key, value in fields.items() if key not in NOT_THE_SHAPE}
