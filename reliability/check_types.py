"""Types of every module: mypy on an installed copy, since in the checkout `pp_fx.passes` and `pp_fx.export` lie apart.

    python reliability/check_types.py

The copy goes to build/installed. What is checked how: pyproject.toml, `[tool.mypy]`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "installed"
ALONE = ("pp_fx_command.py", "optimum/commands/register/register_pp_fx.py")
"""Files that are no part of the package."""


def modules(folder: Path, prefix: str) -> set[str]:
    """Names of the modules below a folder."""
    return {prefix + "/" + path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def main() -> None:
    for folder in (COPY, ROOT / "build" / "lib"):  # what was deleted since lies there still
        shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(COPY)]
    subprocess.run([*pip, str(ROOT)], check=True)
    ours = modules(ROOT / "pp_fx", "pp_fx") | modules(ROOT / "passes", "pp_fx/passes")
    ours |= modules(ROOT / "export", "pp_fx/export")
    missing = {m for m in ours if not (COPY / m).is_file() and "integrations/optimum/" not in m}
    if missing:
        sys.exit(f"not installed, so not checked: {', '.join(sorted(missing))}; add their folder to pyproject.toml")
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    for what in (["-p", "pp_fx"], ALONE):
        done = subprocess.run([*mypy, *what], cwd=COPY)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
