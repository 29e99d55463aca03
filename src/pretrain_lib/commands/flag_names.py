"""What the settings in messages are called on the command line of each subcommand."""

import re

NOT_WITHIN = r"(?<![\w./\\-])"  # a word, or the path of a file
# For each command, the flags or arguments that replace names of settings in error messages.
FLAGS = {
    "prepare": {
        "data.path": "--out",
        "data.source": "SOURCE",
        "data.tokenizer": "--tokenizer",
        "data.train_tokenizer": "--train_tokenizer",
        "data.validation": "--validation",
        "data.text_field": "--text_field",
        "data.max_rejected": "--max_rejected",
        "data.document_separator": "--document_separator",
        "data.loss_spans": "--loss_spans",
    },
    "overlap": {
        "data.source": "SOURCE",
        "data.text_field": "--text_field",
        "data.document_separator": "--document_separator",
        "items": "--items",
        "fields": "--fields",
        "ngram": "--ngram",
    },
    "verify": {"data.path": "FOLDER"},
    "inspect": {
        "data.path": "PATH",
        "data.dtype": "--dtype",
        "data.weights": "--weights",
        "data.packing": "--packing",
        "data.shuffle": "--shuffle",
        "batch.sequence_length": "--sequence_length",
    },
    "tasks": {"data.path": "FOLDER", "items": "--items", "out": "--out"},
    "eval": {"tasks": "--tasks", "include_path": "--include_path"},
    "sample": {"data.tokenizer": "FOLDER"},
    "export": {
        "data.tokenizer": "CHECKPOINT",
        "push_to_hub": "--push_to_hub",
        "scores": "--scores",
        "out": "--out",
    },
    "new": {},
    "train": {"budget": "--budget"},
    "tune": {"budget": "--budget", "width": "--width", "out": "--out"},
    "completion": {},
    "plot": {"panels": "--panels", "x": "--x"},
    "report": {"out": "--out"},
}


def in_terms_of_flags(message: str, command: str) -> str:
    """Replace the names of settings in an error message by the flags of a command."""
    for setting, flag in FLAGS[command].items():
        name = re.escape(setting)
        message = re.sub(rf"{NOT_WITHIN}{name}=", f"{flag} ", message)
        if "." in setting:  # a word of its own nowhere else
            message = re.sub(rf"{NOT_WITHIN}(--)?{name}(?![\w.=/])", flag, message)
    return message
