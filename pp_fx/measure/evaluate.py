"""Perplexity and time of a model over token sequences."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_integers, check_token_ids
from ..errors import InputError
from ..progress import track
from ..ranks import of_all, sharing

_LOSS_CHUNK = 2


@dataclass(frozen=True)
class Evaluation:
    """Result over N sequences.

    Attributes:
        nll: mean negative log-likelihood per token, in nats.
        seconds: wall time of the forward passes (loss not counted).
        per_sequence: fp32 [N], mean NLL of each sequence.
    """

    nll: float
    seconds: float
    per_sequence: Tensor

    @property
    def ppl(self) -> float:
        """Perplexity, exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def stderr_vs(self, other: Evaluation) -> float:
        """Standard error of the mean NLL difference, paired by sequence; NaN for one sequence."""
        difference = self.per_sequence - other.per_sequence
        return (difference.std() / math.sqrt(len(difference))).item()

    def to_dict(self) -> dict[str, float]:
        """nll, ppl, seconds."""
        return {"nll": self.nll, "ppl": self.ppl, "seconds": self.seconds}


@torch.no_grad()
def evaluate(
    model: nn.Module, ids: Tensor, batch: int, *, forward: Any = None, progress: str | None = None
) -> Evaluation:
    """Teacher-forced perplexity: each sequence is one window, its first token is context only.

    Under torch.distributed the ranks share the batches, and all get the numbers of the whole text: those of one
    process with the history frozen (`pp_fx.history_frozen`), since a history that learns sees other batches on each.
    Of a tensor parallel model all ranks run all batches.

    Args:
        model: any causal language model in eval mode.
        ids: int64 [N, T].
        batch: sequences per forward pass. A transformed model selects once per batch.
        forward: what to call instead of `model`, for example `torch.compile(model)`.
        progress: label of a progress bar on stderr, or None.

    Returns:
        Evaluation.

    Raises:
        InputError: the ids or the batch size cannot be used.
    """
    check_token_ids(model, ids, "ids")
    if ids.shape[1] < 2:
        raise InputError(f"ids has shape {tuple(ids.shape)}, no token to predict; give sequences of length >= 2")
    check_integers(1, batch=batch)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    rank, ranks = sharing(model)
    losses, seconds = [], 0.0
    parts: Any = ids.split(batch)[rank::ranks]
    for part in track(parts, progress or "", progress is not None and rank == 0):
        part = part.to(device)
        start = time.perf_counter()
        logits = (forward or model)(input_ids=part, use_cache=False).logits
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        for rows, targets in zip(logits.split(_LOSS_CHUNK), part.split(_LOSS_CHUNK), strict=True):
            loss = F.cross_entropy(rows[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(rows), -1).mean(1).cpu())
    own = (_by_batch(losses, batch), seconds)
    shares = of_all(own) if ranks > 1 else [own]
    order = [share[index] for index in range(len(shares[0][0])) for share, _ in shares if index < len(share)]
    per_sequence, seconds = torch.cat(order), max(lasted for _, lasted in shares)
    return Evaluation(per_sequence.double().mean().item(), seconds, per_sequence)


def _by_batch(losses: list[Tensor], batch: int) -> list[Tensor]:
    """Losses of the sequences, one tensor for each batch."""
    return list(torch.cat(losses).split(batch)) if losses else []


@torch.no_grad()
def evaluate_decoding(
    model: nn.Module, prompts: Tensor, continuation: Tensor, *, progress: str | None = None
) -> Evaluation:
    """Teacher-forced perplexity while decoding: one prefill of the prompts, then one token at a time on the KV cache.

    Args:
        model: any causal language model in eval mode.
        prompts: int64 [B, T], one batch; a transformed model selects on them.
        continuation: int64 [B, N], the tokens to predict; every one but the last is fed back.
        progress: label of a progress bar on stderr, or None.

    Returns:
        Evaluation of the continuation; `seconds` is that of the decode steps.

    Raises:
        InputError: the ids cannot be used.
    """
    check_token_ids(model, prompts, "prompts")
    check_token_ids(model, continuation, "continuation")
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    prompts, continuation = prompts.to(device), continuation.to(device)
    out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    losses, seconds = [F.cross_entropy(out.logits[:, -1].float(), continuation[:, 0], reduction="none")], 0.0
    steps: Any = range(continuation.shape[1] - 1)
    for i in track(steps, progress or "", progress is not None):
        start = time.perf_counter()
        out = model(input_ids=continuation[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        seconds += time.perf_counter() - start
        losses.append(F.cross_entropy(out.logits[:, -1].float(), continuation[:, i + 1], reduction="none"))
    per_sequence = torch.stack(losses, 1).mean(1).cpu()
    return Evaluation(per_sequence.double().mean().item(), seconds, per_sequence)
