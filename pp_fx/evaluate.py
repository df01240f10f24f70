"""Perplexity of any causal language model, over whole texts and while decoding."""

from .measure.evaluate import Evaluation, evaluate, evaluate_decoding

__all__ = ["Evaluation", "evaluate", "evaluate_decoding"]
