"""torch.compile without its slow half: graphs are traced, cut and planned, and then interpreted.

What is left out, the code that Inductor writes and a C++ compiler translates, takes ten seconds and
more for each new graph. Tests of that code do without this module.
"""

from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch._inductor import compile_fx


def interpret_graphs(model, inputs, **_):
    """Compile a graph as far as what backward keeps is decided."""
    return aot_eager_decomp_partition(model, inputs)


def without_code_generation(monkeypatch=None):
    """Let torch.compile interpret its graphs; for good in a process without a `monkeypatch`."""
    if monkeypatch is None:
        compile_fx.compile_fx = interpret_graphs
    else:
        monkeypatch.setattr(compile_fx, "compile_fx", interpret_graphs)
