"""Floating-point operations per token, in both conventions in use, and what devices can do."""

import re
import time
from dataclasses import dataclass

import torch
from torch import nn

# Dense bf16 peak in TFLOP/s without sparsity, from the makers' data sheets; the longest name wins.
PEAK_TFLOPS = {
    "A100": 312,
    "A10G": 70,
    "A40": 149.7,
    "A6000": 154.8,
    "B200": 2250,
    "GB200": 2500,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "L4": 121,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165.2,
}
# Memory in GB by the same sheets. What a device has beyond 10^9 bytes for each is left to CUDA, to
# the network's buffers, and to gaps between tensors.
MEMORY_GB = {
    "A100": 80,
    "A10G": 24,
    "A40": 48,
    "A6000": 48,
    "B200": 180,
    "GB200": 186,
    "H100 NVL": 94,
    "H100 PCIe": 80,
    "H100": 80,
    "H200": 141,
    "L4": 24,
    "L40S": 48,
    "RTX 3090": 24,
    "RTX 4090": 24,
}
ASSUMED_MFU = 0.4  # before a step was measured

# Parameters with a row for each id, padded beyond the vocabulary.
TABLES = ("wte.weight", "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for."""

    device: str = "H100"
    """One of `PEAK_TFLOPS`."""
    mfu: float = ASSUMED_MFU
    """The share of its peak that a step reaches."""
    node: int = 8
    """Devices in a machine."""


@dataclass(frozen=True)
class ModelFlops:
    """Operations of one training step, forward and backward, per token."""

    parameters: float
    """6 N, the convention of scaling laws (Kaplan et al. 2020): attention is left out. N counts
    the weights that a token is multiplied with: all but position and untied input embeddings."""
    attention: float
    """12 L d T on top (Chowdhery et al. 2022, appendix B), causal masking not subtracted."""

    @property
    def total(self) -> float:
        """6 N + 12 L d T, the convention of the `mfu` in the logs."""
        return self.parameters + self.attention


def model_flops(model: nn.Module, *, sequence_length: int) -> ModelFlops:
    """Return the operations per token of one of our models at a sequence length."""
    config = model.config
    head = model.head_weight
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p is head or not name.endswith(("wpe.weight", "wte.weight", "embed_tokens.weight"))
    )
    padding = (head.shape[0] - config.vocabulary_size) * head.shape[1]
    attention = 12 * config.num_layers * config.width * sequence_length
    return ModelFlops(parameters=6 * (matrices - padding), attention=attention)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of one of our models, padding rows of the tables left out."""
    config = model.config
    padding = config.padded_vocabulary_size - config.vocabulary_size
    tables = {id(p): p for n, p in model.named_parameters() if n.endswith(TABLES)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - padding * config.width * len(tables)


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the matrix throughput in FLOP/s against which `mfu` is stated; None if not known.

    A CUDA device's is its data sheet's for bf16; a CPU's is measured here, in half a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
        return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None
    return _measured_matrix_rate(dtype) if device.type == "cpu" else None


def _measured_matrix_rate(dtype: torch.dtype, *, size: int = 2048, repeats: int = 5) -> float:
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
