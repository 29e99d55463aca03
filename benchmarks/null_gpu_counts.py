"""What a step asks of CUDA: the log of the null GPU, and the bytes that operators move."""

import ctypes
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOG = "NULL_GPU_LOG"
HOST_TO_DEVICE, DEVICE_TO_HOST = "1", "2"  # cudaMemcpyKind


@dataclass
class Calls:
    """The calls of CUDA between two places of the log."""

    kernels: Counter = field(default_factory=Counter)
    """Launches by the mangled names of the kernels; sets of memory are among them."""
    refused: Counter = field(default_factory=Counter)
    """Launches that a card would refuse, by name and grid."""
    grids: Counter = field(default_factory=Counter)
    """Blocks by the mangled names of the kernels."""
    waits: Counter = field(default_factory=Counter)
    """Calls in which the host waits for the device."""
    products: Counter = field(default_factory=Counter)
    """Matrix products by the type of their operands."""
    product_flops: float = 0.0
    copied: Counter = field(default_factory=Counter)
    """Bytes copied, by stream and `cudaMemcpyKind`."""

    @property
    def launches(self) -> int:
        """Return the number of kernels, matrix products among them."""
        return self.kernels.total() + self.products.total()


class CallLog:
    """Reads the log of this process piece by piece."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)  # the null GPU is preloaded
        self._path = Path(os.environ[LOG])
        self._read = 0

    def take(self) -> Calls:
        """Return the calls since the last time."""
        self._library.null_gpu_flush()
        calls = Calls()
        if not self._path.exists():
            return calls
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                _count(calls, line.decode().rstrip("\n").split("\t"))
            self._read = file.tell()
        return calls


def _count(calls: Calls, fields: list[str]) -> None:
    kind, *rest = fields
    if kind == "kernel":
        calls.kernels[rest[0]] += 1
        x, y, z = map(int, rest[1:])
        calls.grids[rest[0]] += x * y * z
    elif kind == "refused":
        calls.refused[" ".join(rest)] += 1
    elif kind == "set":
        calls.kernels["memset"] += 1
    elif kind == "wait":
        calls.waits[rest[0]] += 1
    elif kind == "product":
        m, n, k, batch = map(int, rest[:4])
        calls.products[rest[4]] += 1
        calls.product_flops += 2.0 * m * n * k * batch
    elif kind == "copy":
        calls.copied[rest[0], rest[1]] += int(rest[2])


# Operators that are no kernels of their own, or no elementwise ones.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")
ATTENTION = ("attention", "_varlen_attn")
NO_KERNEL = ("empty", "new_empty", "detach", "view", "_unsafe_view", "alias", "_local_scalar_dense")


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of the tensors that each kernel reads and writes, each tensor once.

    Kernels of eager operators are counted by their operators, kernels of compiled code by the names
    that the compiler gives them. Matrix products and attention are left out. Where a kernel reads a
    part of a tensor, as an embedding does, the whole counts.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as it does without this mode."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.by_kernel: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name.split("::")[-1]
        if not (name in PRODUCTS or name in NO_KERNEL or any(a in name for a in ATTENTION)):
            given = _tensors((args, kwargs))
            known = {t.untyped_storage().data_ptr() for t in given}
            made = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in known]
            is_view = operator.is_view
            written = 0 if is_view else _changed_bytes(operator, args, kwargs or {})
            size = sum(t.nbytes for t in given) + sum(t.nbytes for t in made) + written
            if not is_view and size:
                largest = max((*given, *made), key=torch.Tensor.numel)
                of_one = not any(isinstance(a, list) for a in args)
                self.by_kernel[f"{name} of {tuple(largest.shape)}" if of_one else name] += size
        return result

    def note_compiled(self, name: str, arguments: tuple) -> None:
        """Count the launch of a kernel of compiled code."""
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if tensors:
            self.by_kernel[name] += sum(t.nbytes for t in tensors)


def _tensors(tree: Any) -> list[torch.Tensor]:
    found = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_cuda}
    return list(found.values())


def _changed_bytes(operator: Any, args: tuple, kwargs: dict) -> int:
    """Return the bytes of the arguments that an operator writes over."""
    changed = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return sum(t.nbytes for t in _tensors(changed))


class CompiledLaunches:
    """Tells a `BytesMoved` of the kernels that compiled code launches, while it is entered."""

    def __init__(self, moved: BytesMoved) -> None:
        self._moved = moved

    def __enter__(self) -> None:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        self._class, self._run = CachingAutotuner, CachingAutotuner.run
        run, moved = self._run, self._moved

        def counted(tuner: Any, *args: Any, **options: Any) -> Any:
            moved.note_compiled(tuner.fn.__name__, args)
            return run(tuner, *args, **options)

        CachingAutotuner.run = counted

    def __exit__(self, *_: object) -> None:
        self._class.run = self._run
