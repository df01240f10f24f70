"""Channel and head scores, by registry name. Adding one: write a function and put it into `SCORES`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]


def ppsp(importance: Tensor, column_norm: Tensor) -> Tensor:
    """PPsp in closed form (arXiv 2502.15618, equation of section 3.2).

    The paper's || c_j * W[:, j]^2 ||_2 equals c_j * || W[:, j]^2 ||_2, because c_j >= 0 is one number per channel;
    a head's score is the Frobenius norm over its channels.

    Args:
        importance: c, fp32 [units, width]; width is 1 for MLP channels, the head size for attention heads.
        column_norm: w, fp32 [units, width]: || W[:, j]^2 ||_2 of the output projection.

    Returns:
        fp32 [units], larger is more important.
    """
    return (importance * column_norm).norm(dim=-1)


SCORES: dict[str, Score] = {"ppsp": ppsp}
