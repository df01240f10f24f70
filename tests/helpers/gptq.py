"""GPTQ and AWQ, written from the formats: random layers with what they mean, and checkpoints of a tiny Llama."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

from .models import tiny_llama

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours the nibbles of a word hold, the lowest first."""


def packed(numbers, bits, order=None):
    """Numbers [n, m] as a stream of bits, the lowest first, in words int32 [n, ceil(m * bits / 32)]."""
    numbers = numbers if order is None else numbers.unflatten(1, (-1, len(order)))[..., order].flatten(1)
    stream = (numbers[..., None] >> torch.arange(bits) & 1).flatten(1)
    stream = nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (stream << torch.arange(32)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def random_layer(inputs, outputs, bits, group, symmetric=False, generator=None):
    """Numbers [in, out] below 2 ** bits, zero points [groups, out], scales fp16 [groups, out]."""
    groups = inputs // group
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    return codes, zeros, (torch.rand(groups, outputs, generator=generator) / 2**bits / 5 + 1e-3).half()


def meaning(codes, zeros, scales, group, dtype):
    """The weight [out, in]: each number less its zero point, times its scale in this dtype."""
    zeros, scales = (part.repeat_interleave(group, 0) for part in (zeros, scales.to(dtype)))
    return ((codes - zeros).to(dtype) * scales).t()


def gptq_tensors(codes, zeros, scales, bits, group, less=0):
    """What a file holds of a layer; the first version's zero points are `less` one."""
    return {
        "qweight": packed(codes.t(), bits).t().contiguous(),
        "qzeros": packed((zeros - less) % 2**bits, bits),
        "scales": scales,
        "g_idx": (torch.arange(codes.shape[0]) // group).int(),
    }


def awq_tensors(codes, zeros, scales):
    """What a file in AWQ's gemm format holds of a layer."""
    return {"qweight": packed(codes, 4, AWQ_ORDER), "qzeros": packed(zeros, 4, AWQ_ORDER), "scales": scales}


def checkpoint(folder, method, dtype, bits=4, group=32, symmetric=False, version="gptq", act_order=False):
    """A folder of a tiny Llama, its layers' linears (with biases) packed; returns their weights by name."""
    model = tiny_llama(bias=True).to(dtype)
    generator = torch.Generator().manual_seed(3)
    tensors, weights = dict(model.state_dict()), {}
    for name, linear in model.model.named_modules(prefix="model"):
        if not isinstance(linear, nn.Linear):
            continue
        inputs, size = linear.in_features, linear.in_features if group == -1 else group
        layer = random_layer(inputs, linear.out_features, bits, size, symmetric, generator)
        layer[1].clamp_(min=1)  # gptqmodel's one more carries over into the next number where there was no one less
        weights[name] = meaning(*layer, size, dtype)
        parts = awq_tensors(*layer) if method == "awq" else gptq_tensors(*layer, bits, size, int(version == "gptq"))
        if act_order:
            parts["g_idx"] = parts["g_idx"][torch.randperm(inputs, generator=generator)]
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{name}.bias"] = linear.bias.detach().half()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    settings = {"quant_method": method, "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    settings |= {"version": "gemm", "zero_point": True} if method == "awq" else {"checkpoint_format": version}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return weights
