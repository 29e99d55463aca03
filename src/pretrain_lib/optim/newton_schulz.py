"""Orthogonalize matrices by a Newton-Schulz iteration (Jordan et al. 2024, "Muon")."""

import torch

STEPS = 5
# Of the polynomial a x + b x^3 + c x^5, which brings singular values from (0, 1] close to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of each matrix (N, m, n) by values between about 0.7 and 1.2.

    All products are computed in the dtype of `matrices`. A matrix of zeros stays zero.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices  # products of the shorter side are cheaper
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_at_least_fp32(x.dtype))
    x = x / norm.clamp(min=SMALLEST_NORM).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > columns else x


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of orthogonalizing one matrix."""
    m, n = sorted((rows, columns))
    return STEPS * (4 * m**2 * n + 2 * m**3)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
