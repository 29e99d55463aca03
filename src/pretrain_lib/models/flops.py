"""FLOPs per token, in the two common conventions, and the peak FLOP/s of devices."""

import functools
import re
import time
from dataclasses import dataclass

import torch
from torch import nn

from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.models.transformers_flops import attended_width, count_active_weights
from pretrain_lib.models.weight_files import EMBEDDINGS, TABLES

# From the manufacturers' data sheets: dense bf16 peak with fp32 accumulation in TFLOP/s, and memory
# in GB of 10^9 bytes. Any memory beyond that is left to the CUDA context, communication buffers and
# fragmentation. If several names match, the longest one counts.
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
    "MI250X": (191.5, 64),  # per device; a card has two
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
    # No bf16: fp32 peak.
    "T4": (8.1, 16),
    "V100": (15.7, 32),
}
PEAK_TFLOPS = {name: peak for name, (peak, _) in DEVICES.items()}
MEMORY_GB = {name: memory for name, (_, memory) in DEVICES.items()}
# Devices whose peak does not follow from the name: slices of a GPU, and low-power variants.
PART_OF_A_DEVICE = re.compile(r"\bMIG\b|Laptop|Max-Q")
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # large enough to reach the peak rate
ASSUMED_MFU = 0.4  # until a step has been measured


@dataclass(frozen=True)
class Hardware:
    """The hardware for which `--plan` estimates a run."""

    device: str = "H100"
    """One of `PEAK_TFLOPS`."""
    mfu: float = ASSUMED_MFU
    """Model FLOPs utilization: the fraction of the peak that training reaches."""
    node: int = 8
    """Devices per machine."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one training step, forward and backward, per token."""

    parameters: float
    """6 N, the convention of scaling laws (Kaplan et al. 2020), which omits attention itself. N is
    the number of weights used in matrix products: all except position embeddings and untied input
    embeddings."""
    attention: float
    """12 L d T in addition (Chowdhery et al. 2022, appendix B), without a discount for causal
    masking. L is the number of layers, d the width of all heads together, T the sequence length."""

    @property
    def total(self) -> float:
        """6 N + 12 L d T, the convention used for `mfu` in the logs."""
        return self.parameters + self.attention


def model_flops(model: nn.Module, *, sequence_length: int) -> ModelFlops:
    """Return the training FLOPs per token of a model, which may be on the meta device."""
    config = model.config
    if isinstance(config, CausalLMConfig):
        attended = attended_width(model, sequence_length)
        return ModelFlops(parameters=6 * count_active_weights(model), attention=12 * attended)
    head = model.head_weight
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p is head or not name.endswith(("wpe.weight", *EMBEDDINGS))
    )
    padding = (head.shape[0] - config.vocabulary_size) * head.shape[1]
    width = getattr(config, "attention_width", config.width)
    attention = 12 * config.num_layers * width * sequence_length
    return ModelFlops(parameters=6 * (matrices - padding), attention=attention)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, without padded vocabulary rows."""
    config = model.config
    padding = config.padded_vocabulary_size - config.vocabulary_size
    tables = {id(p): p for n, p in model.named_parameters() if n.endswith(TABLES)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - padding * config.width * len(tables)


@functools.cache
def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device, the reference for `mfu`; None if unknown.

    For GPUs in `DEVICES` it is the value of the data sheet. For other GPUs, slices of a GPU, and
    CPUs it is the rate of a matrix product in `dtype`, measured once, in about half a second.
    """
    if device.type == "cuda" and (peak := known_peak(torch.cuda.get_device_name(device))):
        return peak
    return measured_matrix_rate(device, dtype) if device.type in MATRIX_SIZE else None


def has_data_sheet(device: torch.device) -> bool:
    """Return whether `device_peak` is the value of a data sheet, rather than a measured rate."""
    return device.type == "cuda" and known_peak(torch.cuda.get_device_name(device)) is not None


def known_peak(name: str) -> float | None:
    """Return the peak FLOP/s of a GPU by the name that its driver reports; None if unknown."""
    if PART_OF_A_DEVICE.search(name):
        return None
    names = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else None


def measured_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product, the best of five, as of now."""
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
