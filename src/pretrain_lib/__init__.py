"""Pretrain language models inside the Hugging Face ecosystem.

Begin with `data` (text, tokens, windows). The packages follow in the order in which data flows
through a run: `corpus` (the data of one run), `models` and `optim`, `distributed` (Accelerate),
`training` (step, loop, resume), `checkpoint`, `run_folder`, `evaluate`, `export`, `report`.
`config` has the settings, `plan` what they cost, `tuning` finds learning rates, `commands` is the
`pretrain` command, `tensors` has what tensors share.

All of them share `values`, `kinds` and `measures` (rules for what users write), `errors`, `files`,
`quiet` (silences other packages), `ranks` and `wording`.
"""

import lazy_loader

# The names are listed in __init__.pyi. Each is imported on first use: torch takes a second to
# import, which the processes that tokenize can do without.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
