"""Imports go one way, from folder to folder and from wing to wing; and what must start fast stays light."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("clipreid", "shards", "cluster", "launch")
METHOD = ("clipreid", "clipreid.model", "clipreid.weights", "clipreid.statistics", "clipreid.retrieval")
DATA = ("shards", "shards.images", "shards.loading")
RUN = ("cluster", "cluster.settings", "cluster.ranks", "cluster.run")
WINGS = {
    "clipreid": (),
    "clipreid.model": ("clipreid",),
    "clipreid.weights": ("clipreid", "clipreid.model"),
    "clipreid.statistics": ("clipreid",),
    "clipreid.retrieval": ("clipreid", "clipreid.statistics"),
    "shards": (),
    "shards.images": ("shards",),
    "shards.datasets": ("shards", "shards.images"),
    "shards.demo": ("shards",),
    "shards.packing": ("shards", "shards.images", "shards.datasets"),
    "shards.loading": ("shards", "shards.images"),
    "cluster": ("shards",),
    "cluster.settings": ("cluster", *METHOD, *DATA),
    "cluster.ranks": ("cluster", "cluster.settings", "shards"),
    "cluster.run": ("cluster", "cluster.settings", "cluster.ranks", "shards"),
    "cluster.checks": (*RUN, *METHOD, *DATA),
    "cluster.evaluation": (*RUN, *METHOD, *DATA),
    "cluster.comparison": (*RUN, "cluster.checks", "cluster.evaluation", *METHOD, *DATA),
    "cluster.training": (*RUN, "cluster.checks", "cluster.evaluation", *METHOD, *DATA),
    "cluster.launchers": (*RUN, "cluster.training", *METHOD, *DATA),
    "cluster.library": (*RUN, "cluster.evaluation", "cluster.training", *METHOD, *DATA),
    "cluster.deploy": (),
    "launch.small_clip": ("shards.demo", *DATA, *METHOD),
    "launch.study": (*DATA, *METHOD, "cluster", "cluster.settings"),
    "launch": (
        *("shards", "shards.images", "shards.datasets", "shards.demo", "shards.packing", *METHOD, *RUN),
        *("cluster.checks", "cluster.evaluation", "cluster.comparison", "cluster.launchers"),
        *("launch.small_clip", "launch.study"),
    ),
    "launch.scaling": (*DATA, *METHOD, *RUN, "cluster.training"),
    "launch.measure": ("launch", *DATA, *METHOD, *RUN, "cluster.training"),
    "launch.gpu": (),
    "launch.benchmarks": (
        *("launch", "launch.scaling", "launch.measure", "launch.gpu", "shards.datasets", "shards.packing"),
        *(*DATA, *METHOD, *RUN, "cluster.evaluation", "cluster.training"),
    ),
}
"""What each wing may import beside itself, from the bottom up. A folder's own modules are the wing of its name."""

FRONT_DOOR = ("clipreid", "cluster.library")
"""The one module that knows one above it: `import clipreid` is how programs get at the whole. It is looked up when it
is asked for, so that the method stays without it."""

STRANGERS = {
    "clipreid": {"ray", "deepspeed", "webdataset", "torch.distributed"},
    "shards": {"ray", "deepspeed", "torch.distributed"},
}
"""Libraries that a folder must not know."""

MOST_MODULES = 14
"""In one folder, so that whoever opens it sees what it holds. A dataset's layout is a file of its own, however many."""


def modules() -> dict[str, Path]:
    """Every module of the code by its full name; a package is its `__init__`."""
    paths = (path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths}


MODULES = modules()


def wing(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imported(path: Path) -> list[tuple[str, int]]:
    """Full names of what a file imports, in functions too, and the lines; not what only the type checker reads."""
    tree = ast.parse(path.read_text())
    package = ".".join(path.relative_to(ROOT).parent.parts)
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += [(f"{source}.{alias.name}", node.lineno) for alias in node.names]
    return found


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """As `imported`, of the code's own modules alone: `from module import name` is the module."""
    ways = [((name, name.rpartition(".")[0]), line) for name, line in imported(path)]
    return [(next(n for n in names if n in MODULES), line) for names, line in ways if any(n in MODULES for n in names)]


def test_every_folder_of_code_is_a_wing():
    assert {wing(module) for module in MODULES} == set(WINGS)


def test_the_order_of_wings_goes_one_way():
    above = list(WINGS)
    for name, may_import in WINGS.items():
        assert set(may_import) <= set(above[: above.index(name)]), name


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_imports_what_it_may(name):
    found = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {other}"
        for module in MODULES
        if wing(module) == name
        for other, line in imported_modules(MODULES[module])
        if wing(other) not in (name, *WINGS[name]) and (module, other) != FRONT_DOOR
    ]
    assert not found


@pytest.mark.parametrize("folder", STRANGERS)
def test_a_folder_imports_no_library_that_it_must_not_know(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if module.split(".")[0] == folder
        for name, line in imported(path)
        if any(f"{name}.".startswith(f"{stranger}.") for stranger in STRANGERS[folder])
    ]
    assert not found


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {other for other, _ in imported_modules(path)} for module, path in MODULES.items()}
    assert circle(graph) == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of modules, each imported by the next; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_folder_holds_more_modules_than_the_eye_takes_in():
    counts = {name: sum(wing(module) == name != module for module in MODULES) for name in WINGS}
    counts.pop("shards.datasets")
    assert {name: count for name, count in counts.items() if count > MOST_MODULES} == {}


def test_the_top_level_holds_the_agreed_folders_only():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in tracked.stdout.split() if "/" in line and not line.startswith(".")}
    assert folders == {*FOLDERS, "tests", "configs", "docs"}


def test_the_front_door_loads_nothing_before_it_is_used():
    code = "import sys, clipreid.peers; sys.exit(', '.join(m for m in ('cluster', 'shards') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checks_before_a_run_import_neither_torch_nor_ray():
    code = (
        "import sys; import cluster.checks.before_run, cluster.settings.paths; "
        "sys.exit(', '.join(m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_worker_imports_nothing_that_it_does_not_use():
    """Each of a node's workers would keep it in memory, and wait for it at every start."""
    unused = ("ray", "deepspeed", "timm", "transformers", "matplotlib", "sklearn", "pandas", "scipy", "tensorboard")
    code = (
        "import sys; import cluster.ranks.process, cluster.training.worker; "
        f"sys.exit(', '.join(m for m in {unused} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
