"""Whether the region that is being compiled will run under CUDA graphs."""

from __future__ import annotations

import torch


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def compiles_cuda_graphs() -> bool:
    """Of the region that torch.compile traces right now: whether Inductor captures it into CUDA graphs.

    torch.compile(mode="reduce-overhead" or "max-autotune"), options={"triton.cudagraphs": True}, or the global setting
    `torch._inductor.config.triton.cudagraphs`. There is no public question for it, so the present tracer is asked which
    backend it traces for; where that fails, the answer is no.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._inductor import config

    try:
        compiler = InstructionTranslator.current_tx().output.compiler_fn
    except (AttributeError, LookupError):
        return False
    for _ in range(8):  # the user's backend lies in wrappers
        if hasattr(compiler, "compiler_name"):
            break
        compiler = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(compiler, "compiler_fn", compiler)
    if getattr(compiler, "compiler_name", None) != "inductor":
        return False
    return bool(getattr(compiler, "config", {}).get("triton.cudagraphs", config.triton.cudagraphs))
