"""Tiny random models of the decoder families in transformers, with what is expected of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from .device import to_device

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_FALCON = {"parallel_attn": True, "bias": False, "alibi": False, "ffn_hidden_size": 96}


@dataclass(frozen=True)
class Family:
    """`mlp`, `attention`, `query`: pruned (True), or a part of the reason why that stays dense (the query: whole).

    `static`: transformers' own model runs on a StaticCache under torch.compile(fullgraph=True), with the right result.
    """

    config: Any
    mlp: bool | str = True
    attention: bool | str = True
    query: bool | str = True
    static: bool = True
    implementation: str = "sdpa"


def _of(name: str, settings: dict[str, Any], **expected: Any) -> Family:
    return Family(lambda: getattr(hf, f"{name}Config")(**settings), **expected)


def _opt(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96,
        "max_position_embeddings": 256, "word_embed_proj_dim": 64, "bos_token_id": 1, "eos_token_id": None,
        "pad_token_id": 0, **changes,
    }  # fmt: skip


_BASE: dict[str, Any] = {**_COMMON, **_GQA}
_WHOLE, _CONSTANT = "runs as the module it is", "number of heads is a constant"

FAMILIES: dict[str, Family] = {
    "Llama": _of("Llama", _BASE),
    "Mistral": _of("Mistral", {**_BASE, "sliding_window": 24}),
    "Qwen2": _of("Qwen2", _BASE),
    "Qwen3": _of("Qwen3", {**_BASE, "head_dim": 16}),
    "Gemma": _of("Gemma", {**_BASE, "head_dim": 16}),
    "Gemma2": _of(
        "Gemma2",
        {**_BASE, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
        implementation="eager",
    ),
    "Gemma3-text": _of(
        "Gemma3Text",
        {
            **_BASE,
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "Phi": _of(
        "Phi", {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}
    ),
    "Phi3": _of("Phi3", _BASE),
    "OPT": _of("OPT", _opt()),
    "OPT, post-norm": _of("OPT", _opt(do_layer_norm_before=False)),
    "GPT-NeoX": _of("GPTNeoX", {**_COMMON, "intermediate_size": 96, "rotary_pct": 0.5}),
    "GPT-2": _of("GPT2", _GPT2),
    "Falcon": _of("Falcon", {**_COMMON, **_FALCON, "multi_query": True}, attention=_WHOLE),
    "Falcon, new": _of(
        "Falcon",
        {**_COMMON, **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        attention=_WHOLE,
    ),
    "Falcon, alibi": _of(
        "Falcon",
        {**_COMMON, **_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
        attention=_WHOLE,
        static=False,
    ),
    "StableLM": _of("StableLm", {**_BASE, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "StableLM, q/k norm": _of("StableLm", {**_BASE, "qk_layernorm": True}, query=_CONSTANT),
    "OLMo": _of("Olmo", _BASE),
    "OLMo2": _of("Olmo2", _BASE, query=_CONSTANT),
    "Granite": _of("Granite", {**_BASE, "residual_multiplier": 0.22, "attention_multiplier": 0.1}),
    "Cohere": _of("Cohere", _BASE),
    "Cohere, q/k norm": _of("Cohere", {**_BASE, "use_qk_norm": True}, query=_CONSTANT),
    "Cohere2": _of("Cohere2", {**_BASE, "sliding_window": 24}),
    "SmolLM3": _of("SmolLM3", _BASE),
    "Starcoder2": _of("Starcoder2", {**_BASE, "use_bias": True}),
    "Nemotron": _of("Nemotron", _BASE),
    "GLM4": _of("Glm4", {**_BASE, "head_dim": 16}),
    "Helium": _of("Helium", {**_BASE, "head_dim": 16}),
    "GPT-J": _of(
        "GPTJ",
        {**_GPT2, "rotary_dim": 8, "tie_word_embeddings": False},
        implementation="eager",
    ),
    "CodeGen": _of("CodeGen", {**_GPT2, "rotary_dim": 8}, implementation="eager"),
    "GPTBigCode": _of("GPTBigCode", _GPT2),
    "GPT-Neo": _of(
        "GPTNeo",
        {
            "vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96,
            "attention_types": [[["global", "local", "global"], 1]], "window_size": 8, "max_position_embeddings": 256,
            "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        },
        attention=_WHOLE,
        static=False,
        implementation="eager",
    ),
    "Persimmon": _of("Persimmon", {**_COMMON, "intermediate_size": 96}),
    "Exaone4": _of("Exaone4", {**_BASE, "sliding_window": 24, "sliding_window_pattern": 2}),
    "Ernie4.5": _of("Ernie4_5", {**_BASE, "head_dim": 16}),
    "Bloom": _of(
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "pad_token_id": 0},
        attention=_WHOLE,
        static=False,
        implementation="eager",
    ),
    "MPT": _of(
        "Mpt",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2},
        attention=_WHOLE,
        static=False,
        implementation="eager",
    ),
    "Mixtral": _of("Mixtral", {**_BASE, **_EXPERTS}, mlp="experts stay dense"),
    "Qwen3-MoE": _of(
        "Qwen3Moe",
        {**_BASE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        mlp="experts stay dense",
    ),
    "GPT-OSS": _of(
        "GptOss",
        {**_BASE, **_EXPERTS, "head_dim": 16, "sliding_window": 24},
        mlp="experts stay dense",
        implementation="eager",
    ),
}  # fmt: skip


def build(name: str, implementation: str | None = None) -> Any:
    """The family's tiny model in fp32 and eval mode, with weights large enough that errors show up."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(
        family.config(), attn_implementation=implementation or family.implementation
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return to_device(model)
