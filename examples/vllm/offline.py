"""Complete prompts with a pruned model in vLLM, offline.

    python examples/vllm/offline.py MODEL [mlp_ratio]

MODEL: a folder that pp_fx's `save_pretrained` wrote (served with its own settings and history), or with a ratio a dense
folder or hub id.
"""

import sys

from vllm import LLM, SamplingParams

PROMPTS = [
    "In spring the trees are green. In summer the days are long. In autumn the leaves fall. " * 3 + "In winter",
    "def fibonacci(n):\n",
]


def main(model: str, mlp_ratio: str | None = None) -> None:
    options = {}
    if mlp_ratio is not None:
        settings = {"quant_method": "pp_fx", "mlp_ratio": float(mlp_ratio)}
        options = {"quantization": "pp_fx", "hf_overrides": {"quantization_config": settings}}
    llm = LLM(model, max_model_len=1024, **options)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(repr(output.outputs[0].text))


if __name__ == "__main__":
    main(*sys.argv[1:])
