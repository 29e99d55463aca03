"""Pretrain language models inside the Hugging Face ecosystem.

The path of the data is the order of reading: text (`data.sources`), tokens (`data.prepare`),
shuffled and packed windows (`data.order`, `data.batches`), model and loss (`models`, `loss`), step
(`step`), checkpoint (`checkpoint`), and the loop that puts them together (`training`).
"""

import lazy_loader

# The names stand in __init__.pyi. Each is imported when it is used: torch takes a second, which
# the processes that tokenise can do without.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
