"""The properties of a training step that determine its memory and speed."""

from dataclasses import dataclass

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Step:
    """The properties of a training step, on one device, that determine its memory."""

    sequences: int
    """Sequences per micro-batch."""
    length: int
    """Tokens per sequence."""
    micro_batches: int = 1
    precision: str = "bf16"
    """Precision of the matrix products: bf16 (autocast) or fp32."""
    activation_checkpointing: str = "none"
    moments: str = "fp32"
    muon: bool = False
    on_cuda: bool = True
    """On a CPU, the norms of LLaMA keep more, and the loss is computed in smaller blocks."""
    compiled: bool = True
    """On CUDA, compiled blocks of LLaMA keep less, and the compiled loss stores no fp32 logits."""
    documents: int = 0
    """Documents per micro-batch that are kept apart; 0 without document masking."""

    @property
    def fused(self) -> bool:
        """Whether the blocks are compiled for CUDA."""
        return self.on_cuda and self.compiled

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch (N)."""
        return self.sequences * self.length
