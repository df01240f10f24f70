"""`import checkout` before `import pp_fx`: the project as it lies here, without installation."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if importlib.util.find_spec("pp_fx") is None:
    folders = [str(ROOT / "pp_fx"), str(ROOT)]  # `pp_fx.passes` and `pp_fx.export` are the folders beside it
    spec = importlib.util.spec_from_file_location(
        "pp_fx", ROOT / "pp_fx" / "__init__.py", submodule_search_locations=folders
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pp_fx"] = module
    spec.loader.exec_module(module)
