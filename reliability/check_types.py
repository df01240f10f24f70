"""Types of every module: mypy on an installed copy, since in the checkout `pp_fx.passes` and `pp_fx.export` lie apart.

    python reliability/check_types.py

The copy goes to build/installed. What is checked how: pyproject.toml, `[tool.mypy]`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "installed"


def main() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(COPY)]
    subprocess.run([*pip, str(ROOT)], check=True)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "pp_fx"]
    done = subprocess.run(command, cwd=COPY, capture_output=True, text=True)
    print(done.stdout + done.stderr, end="")
    if done.returncode:
        sys.exit(done.returncode)
    found = re.search(r"in (\d+) source files", done.stdout)
    checked, there = int(found[1]) if found else 0, len(list((COPY / "pp_fx").rglob("*.py")))
    if checked < there:  # folders without modules count, too
        sys.exit(f"mypy looked at {checked} of {there} modules; mend [tool.mypy] in pyproject.toml")


if __name__ == "__main__":
    main()
