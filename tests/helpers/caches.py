"""Calls on a KV cache, and what it holds after them."""

import torch
from transformers import DynamicCache, StaticCache

from pp_fx.cache import selections_on


def call(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


def kept(cache):
    """Copies: the next prompt writes into the same memory."""
    return {(i, n): s.kept.clone() for i, groups in selections_on(cache).layers.items() for n, s in groups.items()}


def make(kind, model):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=96)
