"""Tiny random Llamas."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pp_fx

from .device import to_device

EXPORTED = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=100, decode="sticky"
)


def tiny_llama(
    heads=4, kv_heads=2, layers=3, bias=False, tied=False, seed=0, attention="sdpa", intermediate=96, **changes
):
    """A random Llama with weights large enough that errors show up."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 97,
        "hidden_size": 16 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "attention_bias": bias,
        "mlp_bias": bias,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**{**fields, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1) if p.ndim == 1 else p.mul_(4)
    return to_device(model)


def pruned(model, config=EXPORTED, calibrated=True):
    """The model, transformed, and calibrated on random text."""
    pp_fx.transform(model, config)
    if calibrated:
        ids = torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(5))
        pp_fx.calibrate(model, ids, progress=False)
    return model


def calibrated_llama(config=EXPORTED, **changes):
    """A tiny Llama, transformed and calibrated."""
    return pruned(tiny_llama(**changes), config)
