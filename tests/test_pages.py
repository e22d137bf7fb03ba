"""What the pages say of the code: commands that its parsers take, settings, files and links that are there."""

import pydoc
import re
import tomllib
from pathlib import Path

import pytest

from cluster.settings.config import Config, flatten
from cluster.settings.page import page as settings_page
from tests.helpers.commands import ROOT, check_command, check_options, commands
from tests.test_layers import WINGS

COMMANDS = {
    "README.md": 20,
    "configs/README.md": 14,
    "cluster/deploy/README.md": 20,
    "docs/comparing.md": 3,
    "docs/faults.md": 1,
    "docs/own-data.md": 9,
}
"""Pages with commands, and how many there are at least: fewer, and they were not recognised."""
PAGES = sorted({*(ROOT / name for name in COMMANDS), *(ROOT / "docs").glob("*.md")})
SETTINGS = set(flatten(Config.model_validate({"data": {"shards": "-"}}).model_dump()))
SECTIONS = "|".join(sorted({key.split(".")[0] for key in SETTINGS if "." in key}))
SETTING = re.compile(rf"((?:{SECTIONS})\.(?!py\b|safetensors\b)\w+)(?:=.*)?")
FILE = re.compile(r"(?<![\w/.-])(?:clipreid|shards|cluster|launch|configs|tests|docs)/[\w./*-]*\w")

DOTTED = re.compile(r"(?:clipreid|shards|cluster|launch)(?:\.\w+)+(?<!\.py)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", COMMANDS)
def test_every_command_is_one_that_its_program_takes(page):
    found = commands(ROOT / page)
    assert len(found) >= COMMANDS[page]
    for command in found:
        check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "python launch/evaluate.py --weights runs/demo --ouf metrics.json",
        "python launch/extract.py --config configs/demo.yaml --weights runs/demo --split querry --out query.npz",
        "python launch/train.py --config configs/dem.yaml",
        "python launch/train.py --config configs/demo.yaml cluster.launchr=local",
        "python launch/pack.py build --dataset omniglott --root a.zip --out data/a",
        "python launch/statu.py runs/demo",
        "torchrun --nproc-pr-node 2 launch/train.py --config configs/demo.yaml",
        "make trian",
        "ray job submit --working-dri . -- python launch/train.py --config configs/demo.yaml",
        "ray job submit --working-dir . -- python launch/train.py --config configs/dem.yaml",
        "ray strat --head",
    ],
)
def test_a_mistyped_command_is_found(command):
    with pytest.raises(Exception, match=r"refused|no such file|unknown key|no dataset|querry|statu|trian|no command"):
        check_command(command)


def test_every_benchmark_in_the_readme_is_one_that_bench_py_has():
    measured = (ROOT / "README.md").read_text().split("## Measured")[1].split("## ")[0]
    rows = [line for line in measured.splitlines() if line.startswith("|") and "---" not in line][1:]
    assert len(rows) >= 7
    name = ""
    for row in rows:
        first, *others = row.strip("| ").split("|") if not row.startswith("| |") else ("", *row.split("|")[2:])
        name = spans(first)[0] if spans(first) else name
        options = [span.split() for span in spans("|".join(others)) if span.startswith("--")]
        for arguments in options or [[]]:
            check_options("bench", [name, *arguments])


def test_the_same_versions_of_python_are_named_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [line.rsplit(" ")[-1] for line in project["classifiers"] if "Python :: 3" in line]
    first, *_, last = versions
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"\bpython(3\.\d+)", makefile)) == set(versions)
    after = f"3, {int(last.split('.')[1]) + 1}"
    assert f"({first.replace('.', ', ')}) <= sys.version_info < ({after})" in makefile
    named = f"{', '.join(versions[:-1])} or {last}"
    assert f"Python {named}" in makefile and f"Python {named}" in (ROOT / "README.md").read_text()
    assert project["requires-python"] == f">={first}"


def test_every_library_states_the_oldest_version_that_is_enough():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert [line for line in wanted if not re.fullmatch(r"[\w-]+(\[[\w,]+\])?>=[\d.]+", line)] == []


@each_page
def test_every_setting_in_backticks_is_one(page):
    named = [word for span in spans(page.read_text()) for word in span.split()]
    keys = {match[1] for word in named if (match := SETTING.fullmatch(word))}
    assert {key for key in keys if not any(f"{known}.".startswith(f"{key}.") for known in SETTINGS)} == set()


@each_page
def test_every_file_of_the_project_that_a_page_names_exists(page):
    assert [name for name in FILE.findall(page.read_text()) if not list(ROOT.glob(name))] == []


@each_page
def test_every_module_named_without_its_folder_is_an_entry_point_or_in_a_folder_that_its_line_links_to(page):
    missing = []
    for line in page.read_text().splitlines():
        folders = [ROOT, ROOT / "launch", *(page.parent / link for link in links(line))]
        names = [span.split()[0] for span in spans(line)]
        modules = [name for name in names if re.fullmatch(r"[\w/]+\.py", name)]
        missing += [name for name in modules if not any((folder / name).is_file() for folder in folders)]
    assert missing == []


@each_page
def test_every_name_with_its_module_is_there(page):
    named = {span for span in spans(page.read_text()) if DOTTED.fullmatch(span)}
    assert [name for name in sorted(named - SETTINGS) if pydoc.locate(name) is None] == []


@each_page
def test_every_test_that_a_page_names_is_there(page):
    suite = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", page.read_text()) if f"def {name}(" not in suite] == []


def test_the_page_of_settings_is_what_their_types_say():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), "make docs"


@each_page
def test_every_link_leads_somewhere(page):
    for link in links(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-").lower() for heading in headings}


def test_the_readmes_table_of_folders_names_every_wing():
    rows = {links(line)[0]: line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| [")}
    for name in WINGS:
        folder, _, wing = name.partition(".")
        assert f"`{wing.replace('.', '/')}/`" in rows[folder] or not wing, name


def test_what_the_tour_names_in_a_module_is_in_it():
    """Functions and classes of a numbered item, in one of the modules that the item names."""
    missing = []
    for item in re.split(r"^\d+\. ", (ROOT / "docs" / "tour.md").read_text(), flags=re.MULTILINE)[1:]:
        item = item.split("\n\n")[0]
        files = [ROOT / name for name in FILE.findall(item) if name.endswith(".py")]
        modules = [path.read_text() for path in files if path.is_file()]
        named = [span for span in spans(item) if re.fullmatch(r"\w+(\.\w+)?", span) and not SETTING.fullmatch(span)]
        names = [span for span in named if not span.endswith((".json", ".yaml", ".safetensors"))]
        missing += [n for name in names for n in name.split(".") if not any(n in module for module in modules)]
    assert missing == []
