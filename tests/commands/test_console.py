"""A console that cannot show a text gets it escaped."""

import sys
from pathlib import Path

import pytest

from pretrain_lib import GPT2, GPT2Config, build_adamw, load_tokenizer, save_checkpoint
from pretrain_lib.checkpoint.state import TrainingState
from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER
from tests.conftest import run_command

LOCALES = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
}


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES)
def test_a_sample_is_escaped_where_the_console_cannot_show_it(locale, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / TOKENIZER_FOLDER)
    size = tokenizer.vocabulary_size
    model = GPT2(GPT2Config(size, context_length=16, num_layers=1, num_heads=2, width=16))
    optimizer = build_adamw(model, learning_rate=1e-2)
    options = {"tokenizer": tokenizer, "manifest": {}}
    folder = save_checkpoint(tmp_path, TrainingState(step=1), model, optimizer, **options)
    program = Path(sys.executable).with_name("pretrain")
    command = [program, "sample", folder, "--prompt", "\u5b57", "--tokens", "1"]
    result = run_command(sys.executable, *command, environment=LOCALES[locale])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(r"\u5b57")
