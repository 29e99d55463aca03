"""Pretrain language models inside the Hugging Face ecosystem.

The packages in the order in which data flows through a run: `data` (text, tokens, windows),
`corpus` (the data of one run), `models` and `optim`, `distributed` (Accelerate), `training` (step,
loop, resume), `checkpoint`, `run_folder`, `evaluate`, `export`, `report`. `config` has the
settings, `plan` what they cost, `commands` the `pretrain` command, `tensors` what tensors share.
"""

import lazy_loader

# The names are listed in __init__.pyi. Each is imported on first use: torch takes a second to
# import, which the processes that tokenize can do without.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
