"""Transfer learning rates from one model width to another.

A layer learns features at every width if its weights and each update have the spectral norm
sqrt(rows / columns) up to a constant (Yang, Simon and Bernstein 2023, "A Spectral Condition for
Feature Learning", arXiv 2310.17813). The matrices of the layers keep their proportions when the
width D changes, so for them this norm is a constant, and the rate undoes what the optimizer does:

- Muon's update is orthogonal times 0.2 sqrt(max(rows, columns)), so its spectral norm grows as
  sqrt(D), and the rate falls as 1 / sqrt(D).
- AdamW's update has elements of constant size that agree with one another, so its spectral norm
  grows as D, and the rate falls as 1 / D.

Embeddings read one row at a time, and norms and biases have no columns: their rates stay. The rule
would have an output head's rate fall with the width as well; a tied head shares the embedding's.
"""

MATRIX_POWER = {"muon": -0.5, "adamw": -1.0}
BASE, MATRIX, EMBEDDING = "learning_rate", "matrix_learning_rate", "embedding_learning_rate"


def at_width(rates: dict[str, float], *, kind: str, tuned: int, wanted: int) -> dict[str, float]:
    """Return the rates for the width `wanted` of rates that were tuned at the width `tuned`.

    `kind` is the optimizer's. `rates` are by setting; a matrix rate that is not among them is
    the base rate, and the result names it if it becomes another.
    """
    if wanted == tuned:
        return dict(rates)
    matrix = rates.get(MATRIX, rates[BASE])
    return rates | {MATRIX: matrix * (wanted / tuned) ** MATRIX_POWER[kind]}
