"""The folders that transformers writes and reads for its own models: names, layouts, configuration.

Some families keep their weights in other shapes in memory than on disk: the experts of a mixture
are one tensor in memory and many in a folder. transformers converts them.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from pretrain_lib.data.text.same_ids import differing_parts
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.models.adapter import CausalLMAdapter
from pretrain_lib.models.interface import saved_tensors
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.models.weight_files import check_tied_head, check_weights
from pretrain_lib.quiet import without_foreign_progress
from pretrain_lib.wording import in_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "model."  # of the wrapped model's parameters


def to_folder(model: CausalLMAdapter, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole tensors, by the names that they have in the adapter, as a folder holds them."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return revert_weight_conversion(model.model, state)


def names_in_folder(model: CausalLMAdapter) -> dict[str, list[str]]:
    """Return the names of the tensors of a folder by the one of the adapter they are made of."""
    return {
        name: sorted(to_folder(model, {name: torch.empty(tensor.shape, device="meta")}))
        for name, tensor in saved_tensors(model).items()
    }


def loaded_tensors(model: CausalLMAdapter) -> dict[str, torch.Tensor]:
    """Return what is saved by the names that it has in memory under transformers."""
    return saved_tensors(model.model)


def write_configuration(
    config: CausalLMConfig, folder: Path, *, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> None:
    """Write `config.json` as transformers does, with the special tokens of the tokenizer."""
    hf = copy.deepcopy(config.hf)
    if tokenizer is not None:
        hf.bos_token_id = hf.eos_token_id = tokenizer.end_of_text_id
    hf.dtype = dtype
    hf.architectures = [class_name(config)]
    hf.save_pretrained(folder)


def check_pair(config: CausalLMConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError if transformers loads another tokenizer from a folder with this model.

    For some families it builds their own from the vocabulary, whatever the tokenizer's files say.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        write_configuration(config, folder, tokenizer=tokenizer, dtype=torch.float32)
        try:
            loaded = AutoTokenizer.from_pretrained(folder).backend_tokenizer
            differing = differing_parts(tokenizer.backend, loaded)
        except Exception:  # transformers raises many types
            differing = ["model"]
    if differing:
        raise ValueError(
            f"model_type={config.model_type} does not go with the tokenizer: from a folder with "
            f"both, transformers builds the tokenizer of that family, with another "
            f"{' and '.join(differing)}, and every tool would give a text other ids than training "
            f"did; use a tokenizer of that family, or a family that takes any, such as qwen3"
        )


def class_name(config: CausalLMConfig) -> str:
    """Return the name of transformers' class, such as Qwen3ForCausalLM."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.hf)].__name__


def load_weights(model: CausalLMAdapter, folder: Path) -> None:
    """Load the weights of a folder, as transformers itself does, into the adapter or its shards.

    The whole model is in CPU memory in the meantime. Raises ValueError for tensors that are missing
    or have no place, for shapes that differ, and for a tied output projection that is stored with
    other values than the embedding.
    """
    check_weights(folder)
    if getattr(model.config.hf, "tie_word_embeddings", False):  # not every class has it
        check_tied_head(folder)
    try:
        model.copy_from(load_whole(folder, model.config.hf))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def load_whole(folder: Path, hf: "PreTrainedConfig") -> "PreTrainedModel":
    """Load a model with transformers, in fp32 on the CPU.

    Raises ValueError for tensors that are missing or unexpected, and for shapes that differ.
    """
    from transformers import AutoModelForCausalLM

    with without_foreign_progress(), torch.random.fork_rng(devices=[]):
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=copy.deepcopy(hf),
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except RuntimeError as error:
            raise ValueError(in_line(error)) from error
    for name, shape, needed in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, the model of config.json needs {tuple(needed)}"
        )
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(map(str, report[kind])):
            what = "are missing" if kind == "missing_keys" else f"have no place in {hf.model_type}"
            raise ValueError(f"the tensors {names[:3]} {what}")
    return model


def read_config(folder: Path) -> CausalLMConfig:
    """Read the `config.json` of a folder as the configuration of a model of transformers.

    Raises ValueError, naming the folder, for one that is not supported.
    """
    try:
        return CausalLMConfig(config=str(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
