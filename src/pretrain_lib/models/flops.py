"""Floating-point operations per token, in both conventions in use, and what devices can do."""

import re
import time
from dataclasses import dataclass

import torch
from torch import nn

# By the makers' data sheets: the dense bf16 rate in TFLOP/s, without sparsity, accumulated in fp32,
# and the memory in GB. What a device has beyond 10^9 bytes for each GB is left to CUDA, to the
# network's buffers, and to gaps between tensors. The longest name wins.
DEVICES = {
    "A10": (125, 24),
    "A100": (312, 80),
    "A10G": (70, 24),
    "A30": (165, 24),
    "A40": (149.7, 48),
    "A6000": (154.8, 48),
    "A800": (312, 80),
    "B200": (2250, 180),
    "B300": (2250, 270),
    "GB200": (2500, 186),
    "GB300": (2500, 279),
    "GH200": (989, 96),
    "H100": (989, 80),
    "H100 NVL": (835, 94),
    "H100 PCIe": (756, 80),
    "H20": (148, 96),
    "H200": (989, 141),
    "H200 NVL": (835, 141),
    "H800": (989, 80),
    "L4": (121, 24),
    "L40": (181, 48),
    "L40S": (362, 48),
    "MI250X": (191.5, 64),  # a card is two devices
    "MI300X": (1307, 192),
    "MI325X": (1307, 256),
    "MI355X": (2517, 288),
    "RTX 3090": (71, 24),
    "RTX 3090 Ti": (80, 24),
    "RTX 4080": (97.5, 16),
    "RTX 4090": (165.2, 24),
    "RTX 4090 D": (147, 24),
    "RTX 5090": (209.5, 32),
    "RTX 6000 Ada": (364, 48),
    "RTX PRO 6000": (504, 96),
    # These have no bf16 and train in fp32, at this rate.
    "T4": (8.1, 16),
    "V100": (15.7, 32),
}
PEAK_TFLOPS = {name: peak for name, (peak, _) in DEVICES.items()}
MEMORY_GB = {name: memory for name, (_, memory) in DEVICES.items()}
# Devices whose rate the name does not tell: a slice of a GPU, or one with less power.
PART_OF_A_DEVICE = re.compile(r"\bMIG\b|Laptop|Max-Q")
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # of a product whose rate no longer grows with it
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

    It is that of the data sheet for bf16 where the device is known by its name; of another GPU, a
    slice of one, or a CPU it is measured here, in half a second.
    """
    if device.type == "cuda" and (known := known_peak(torch.cuda.get_device_name(device))):
        return known
    return _measured_matrix_rate(device, dtype) if device.type in MATRIX_SIZE else None


def known_peak(name: str) -> float | None:
    """Return the FLOP/s of a GPU by the name that its driver gives; None if it is not known."""
    if PART_OF_A_DEVICE.search(name):
        return None
    known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def _measured_matrix_rate(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
