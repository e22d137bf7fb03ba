"""Imports go one way: launch -> cluster -> {clipreid, shards}; and what must start fast stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "clipreid": {"shards", "cluster", "launch", "ray", "deepspeed", "webdataset", "torch.distributed"},
    "shards": {"clipreid", "cluster", "launch", "ray", "deepspeed", "torch.distributed"},
    "cluster": {"launch"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("layer", sorted(FORBIDDEN))
def test_a_layer_imports_nothing_it_must_not_know(layer):
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / layer).rglob("*.py"))
        for name, line in imported(path)
        if any(name == taboo or name.startswith(taboo + ".") for taboo in FORBIDDEN[layer])
    ]
    assert not found


def test_the_top_level_holds_the_agreed_folders_only():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in tracked.stdout.split() if "/" in line and not line.startswith(".")}
    assert folders == {"cluster", "clipreid", "shards", "launch", "tests", "configs"}


def test_checks_before_a_run_import_neither_torch_nor_ray():
    code = (
        "import sys; import cluster.checks.before_run, cluster.settings.paths; "
        "sys.exit(', '.join(m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
