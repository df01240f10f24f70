"""The rooms of the house: who may import whom, how long a file may be, who may write to what (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400
RANKS = [
    {
        "errors",
        "_version",
        "checks",
        "devices",
        "process_settings",
        "progress",
        "requirements",
        "text",
        "native_library",
        "ranks",
        "shards",
    },  # the ground
    {"layouts"},
    {"kernels"},
    {"methods"},
    {"probe_config"},
    {"config"},
    {"runtime"},
    {"capture", "groups"},
    {"passes"},
    {"rewrite"},
    {"calibration"},
    {"measure", "integrations"},
    {"models"},  # of the command line: it knows what a saved model looks like
    {"export"},
    {"cli"},
    {"", "bench", "cache", "evaluate", "macs"},  # the faces: what users import by these names
]
"""Lower rooms first; rooms side by side do not know each other."""
BACKWARD = {("integrations.optimum.register_pp_fx", "cli")}
"""optimum's command runs ours."""
OPTIONAL = {"triton_drop", "triton_gather", "triton_strongest", "triton_top", "report_figures"}
"""Modules that need a package which may be missing: these alone are imported inside functions."""


def sources():
    """Module name inside of pp_fx -> file."""
    found = {}
    for folder, prefix in ((ROOT / "pp_fx", ""), (ROOT / "passes", "passes."), (ROOT / "export", "export.")):
        for path in folder.rglob("*.py"):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(name):
    """Modules of ours that a module imports, each with whether it does so inside a function; not for types alone."""
    package = name.split(".") if SOURCES[name].name == "__init__.py" else name.split(".")[:-1]
    inside = {id(n) for f in ast.walk(TREES[name]) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    typed = {id(n) for i in ast.walk(TREES[name]) if _for_types(i) for n in ast.walk(i)}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pp_fx":
                    yield alias.name.partition(".")[2], id(node) in inside
        if not isinstance(node, ast.ImportFrom) or id(node) in typed:
            continue
        if node.level:
            whole = [part for part in package if part]
            base = [*whole[: len(whole) - node.level + 1], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == "pp_fx":
            base = node.module.split(".")[1:]
        else:
            continue
        base = ".".join(part for part in base if part)
        for alias in node.names:
            module = f"{base}.{alias.name}".strip(".")
            yield (module if module in SOURCES else base), id(node) in inside


def _for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room(name):
    return name.split(".")[0]


def rank(name):
    return next(i for i, rooms in enumerate(RANKS) if room(name) in rooms)


def test_every_module_has_a_room():
    assert len(SOURCES) > 100
    for name in SOURCES:
        rank(name)


def test_no_room_imports_a_higher_one_or_its_neighbour():
    for name in SOURCES:
        for target, _ in imports(name):
            within = room(name) == room(target) or {rank(name), rank(target)} <= {0} or rank(name) == len(RANKS) - 1
            if within or (name, target) in BACKWARD:
                continue
            assert rank(target) < rank(name), f"{name} imports {target}"


def test_the_exceptions_are_still_needed():
    found = {(name, target) for name in SOURCES for target, _ in imports(name)}
    assert found >= BACKWARD


def test_no_import_hides_inside_a_function():
    for name in SOURCES:
        if name == "integrations.optimum.register_pp_fx":  # read at every start of optimum's command line
            continue
        for target, inside in imports(name):
            assert not inside or target.split(".")[-1] in OPTIONAL, f"{name} imports {target} inside a function"


def test_no_circle():
    """Depth first: a module that is met again while its own imports are followed closes a circle."""
    graph = {name: {t for t, _ in imports(name) if t != name} for name in SOURCES}
    done, path = set(), []

    def follow(name):
        if name in done:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for target in sorted(graph[name]):
            follow(target)
        done.add(path.pop())

    for name in sorted(SOURCES):
        follow(name)


@pytest.mark.parametrize("folder", ["pp_fx", "passes", "export", "tests", "benchmarks", "reliability", "docs"])
def test_no_file_is_too_long(folder):
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines"


def test_every_module_says_what_it_is():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), f"{name} has no docstring"


def test_a_selection_alone_writes_to_itself():
    """Whatever the object is called: what only a selection has is set nowhere else."""
    cls = next(n for n in TREES["runtime.selections"].body if isinstance(n, ast.ClassDef) and n.name == "Selection")
    own = {target.attr for node in ast.walk(cls) for target in written(node)}
    assert {"kept", "compacts", "inputs", "output"} <= own
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            for target in written(node):
                if target.attr in own and ast.unparse(target.value) != "self" and name != "runtime.selections":
                    assert (name, target.attr) == ("rewrite.layer", "version"), f"{name}: {ast.unparse(target)}"


def test_what_is_imported_by_name_is_known():
    """`import_module` hides an import from the tests above: the faces alone use it."""
    users = {name for name, tree in TREES.items() if "import_module" in ast.unparse(tree)}
    assert users == {"", "export"}


def written(node):
    """Attributes that a statement sets."""
    if isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [t for t in flat if isinstance(t, ast.Attribute)]
