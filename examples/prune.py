"""Prune a model, generate with it, save it, and load it again.

python examples/prune.py MODEL OUT [--ratio 0.4] [--text "The quick brown fox"]
"""

import argparse

from transformers import AutoModelForCausalLM

import pp_fx
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, a hub id, or smollm2")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--text", default="The quick brown fox")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=options.ratio))
    pp_fx.calibrate(model, read(PYTHON_DOCS)[:50_000], tokenizer=tokenizer, length=128)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    again = AutoModelForCausalLM.from_pretrained(options.out)
    inputs = tokenizer(options.text, return_tensors="pt")
    print(tokenizer.decode(again.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main()
