"""One row of perplexity on the real model, against the row on record: a change that costs quality does not pass.

    python reliability/perplexity.py            # fails where the default loses more than 1%
    python reliability/perplexity.py --record   # after a change that is meant to move it

SmolLM2-135M in fp32 (the same numbers on every processor), Python's own documentation: 4 x 512 tokens as one batch,
calibrated on 4 others; the default.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import pp_fx
from pp_fx.evaluate import evaluate
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences

RECORD = Path(__file__).parent / "results" / "perplexity.json"
MOST = 1.01


def measure() -> dict[str, float]:
    """Perplexity dense and with the default configuration."""
    model, tokenizer = load("smollm2", torch.float32)
    ids = sequences(read(PYTHON_DOCS), tokenizer, 8, 512)
    dense = evaluate(model, ids[4:], 4).ppl
    pp_fx.transform(model)
    pp_fx.calibrate(model, ids[:4], progress=False)
    return {"dense": dense, "pruned": evaluate(model, ids[4:], 4).ppl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="take what is measured for the row on record")
    options = parser.parse_args()
    found = measure()
    print(json.dumps(found))
    if options.record:
        RECORD.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(RECORD.read_text(encoding="utf-8"))
    ratios = {name: found[name] / before[name] for name in before}
    if not all(ratio <= MOST for ratio in ratios.values()):  # NaN is no pass
        sys.exit(f"perplexity over the one on record: {ratios}; at most {MOST} passes")


if __name__ == "__main__":
    main()
