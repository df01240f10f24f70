"""Proofs that heads are separable, by running the captured graph on small tensors: some heads, then all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..errors import CaptureError
from .dataflow import Execution, shape
from .projections import Projection, shaped


class NoProof(Exception):
    """A branch cannot be proved separable: the message says why."""


def prove_output(graph: fx.Graph, output: Projection, core: fx.Node, heads: int, width: int) -> None:
    """Column h * width + d of the output projection must read element d of head h, and nothing else.

    Raises:
        NoProof: it does not.
    """
    run = Execution(graph)
    code = torch.arange(run.batch * run.length * heads * width, dtype=torch.float64)
    code = code.view(run.batch, run.length, heads, width)
    (columns,) = run.run([output.x], {core: code})
    if not torch.equal(columns, code.flatten(2)):
        raise NoProof("the attention output is rearranged before the output projection")
    kept = torch.arange(heads)[: max(1, heads - 1)]
    (columns,) = run.run([output.x], {core: code.index_select(2, kept)})
    if not torch.equal(columns, code.index_select(2, kept).flatten(2)):
        raise NoProof("the number of heads is a constant behind the attention core")


def prove_query(graph: fx.Graph, query: Projection, q: fx.Node, heads: int, width: int) -> None:
    """Running the rows of some heads must give exactly those heads of the full run.

    Raises:
        NoProof: it does not.
    """
    run = Execution(graph)
    uniform = torch.rand(run.batch, run.length, heads, width, dtype=torch.float64, generator=run.generator)
    for scale in (1.0, 1e3):  # small and large: a clip acts on one of them alone
        full = (2 * uniform - 1) * scale

        def columns(kept: Tensor, full: Tensor = full) -> Tensor:
            seeds = {query.node: shaped(full.index_select(2, kept).flatten(2), query.node, width)}
            (value,) = run.run([q], seeds)
            return value.transpose(1, 2).flatten(2)

        _prove_separable(columns, heads, width, "the way from the query projection to the core")


def prove_written_out(
    graph: fx.Graph, query: Projection, output: Projection, seen: tuple[fx.Node, ...], heads: int, width: int
) -> None:
    """As `prove_query`, of an attention that is written out in the layer, with the keys and values `seen`.

    Raises:
        NoProof: it does not.
    """
    run = Execution(graph)
    generator = run.generator

    def random(*dims: int) -> Tensor:
        return torch.rand(dims, dtype=torch.float64, generator=generator)

    full = random(run.batch, run.length, heads, width)
    keys = [random(run.batch, heads, run.length, shape(n)[3]) for n in seen]

    def columns(kept: Tensor) -> Tensor:
        seeds = {query.node: shaped(full.index_select(2, kept).flatten(2), query.node, width)}
        seeds.update({n: k.index_select(1, kept) for n, k in zip(seen, keys, strict=True)})
        return run.run([output.x], seeds)[0]

    _prove_separable(columns, heads, width, "the layer's own attention")


def _prove_separable(columns: Callable[[Tensor], Tensor], heads: int, width: int, where: str) -> None:
    """`columns(kept)` [B, T, kept * width] must be the kept heads' columns of `columns(all)`, for several choices."""
    whole = columns(torch.arange(heads)).unflatten(2, (heads, width))
    for kept in (torch.arange(1, heads), torch.arange(heads - 1), torch.arange(0, heads, 2)):
        if kept.numel() == 0:
            continue
        try:
            part = columns(kept)
        except CaptureError:
            raise NoProof(f"the number of heads is a constant on {where}") from None
        expected = whole.index_select(2, kept).flatten(2)
        if part.shape != expected.shape or not torch.allclose(part, expected, rtol=1e-9):
            raise NoProof(f"something mixes the heads on {where}")
