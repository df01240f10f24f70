"""The differential campaign of tests/behaviour/test_campaign.py at length, and what it found.

python reliability/campaign.py --draws 1000
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "campaign.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, help="of hypothesis; default: a new one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    environment = {**os.environ, "PP_FX_DRAWS": str(options.draws), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/behaviour/test_campaign.py", "--hypothesis-profile=default"]
    command.append("--hypothesis-show-statistics")
    if options.seed is not None:
        command.append(f"--hypothesis-seed={options.seed}")
    start = time.monotonic()
    with Console(stderr=True).status(f"{options.draws} draws"):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts = re.findall(r"(\d+) passing, (\d+) failing, and \d+ invalid", done.stdout)
    passing = sum(int(found[0]) for found in counts)
    failing = sum(int(found[1]) for found in counts)
    result = {
        "asked": options.draws,
        "passing": passing,
        "failing": failing,
        "result": "passed" if done.returncode == 0 else "FAILED",
        "seconds": round(time.monotonic() - start),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Console().print(result)
    if done.returncode:
        print(done.stdout)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
