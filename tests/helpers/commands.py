"""Commands that the pages show, and what the programs' own parsers make of them.

page ──▶ [commands] ──▶ [check_command] ──▶ AssertionError where the program would refuse the command
"""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path
from unittest.mock import patch

import click
from ray.scripts.scripts import cli as ray_cli
from torch.distributed.run import get_args_parser

from cluster.settings.yaml_file import load_config
from launch import bench
from launch.cli import Parser
from shards.datasets import DATASETS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("python", "torchrun", "ray", "make", "sbatch", "kubectl exec")
SPLITS = ("train", "query", "gallery", "test")
MODULE = re.compile(r"launch/(\w+)\.py")


def commands(page: Path) -> list[str]:
    """Command lines of a page, in its order: of its indented blocks, continued lines joined, and those in backticks.

    `ray start` in a sentence is a name; with an option or a file it is a command.
    """
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if line.startswith("    "):
            found += _programs(line)
        for span in re.findall(r"`([^`]+)`", line):
            found += [command for command in _programs(span) if re.match(r"make |.* .*[-/]", command)]
    return list(dict.fromkeys(found))


def _programs(line: str) -> list[str]:
    """The commands of one shell line that start a program of PROGRAMS, without what the shell takes for itself."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # A quoted text over several lines, or an apostrophe in a diagram.
        assert not any(line.strip().startswith(f"{program} ") for program in PROGRAMS), line
        return []
    found = []
    for command in _split(words):
        while command and re.match(r"\w+=", command[0]):
            del command[0]
        joined = shlex.join(command).removeprefix(".venv/bin/")
        if joined.startswith(tuple(f"{program} " for program in PROGRAMS)):
            found.append(joined)
    return found


def _split(words: list[str]) -> list[list[str]]:
    parts, skip = [[]], False
    for word in words:
        if set(word) <= set("();&|"):
            parts.append([])
            skip = False
        elif set(word) <= set("<>"):
            skip = True
        elif not skip:
            parts[-1].append(word)
    return parts


def check_command(command: str) -> None:
    """Raises AssertionError where the program's own parser, or the settings, refuse the command."""
    try:
        _check(shlex.split(command))
    except SystemExit:
        raise AssertionError(f"refused: {command}") from None
    except click.ClickException as error:
        raise AssertionError(f"refused: {command}: {error.format_message()}") from None


def _check(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        for made in made_commands(*arguments):
            check_command(made)
    elif program == "kubectl":
        _check(arguments[arguments.index("--") + 1 :])
    elif program == "sbatch":
        script = next(n for n, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[script]).is_file(), arguments[script]
        _check(["python", "launch/train.py", *arguments[script + 1 :]])
    elif program == "ray":
        _check_ray(arguments)
    elif program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        _check(["python", options.training_script, *options.training_script_args])
    elif arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        check_options(MODULE.fullmatch(arguments[0])[1], arguments[1:])


def _check_ray(arguments: list[str]) -> None:
    command = ray_cli
    while isinstance(command, click.Group):
        assert arguments and arguments[0] in command.commands, f"ray has no command {' '.join(arguments)}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    options = command.make_context(command.name, list(arguments)).params
    if "entrypoint" in options:
        _check(list(options["entrypoint"]))


def made_commands(*targets: str) -> list[str]:
    """What make would run for the targets. AssertionError where it has none of that name."""
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [command for line in lines for command in _programs(line) if MODULE.search(command)]


class _Parsed(Exception):
    """Ends an entry point once its arguments are parsed."""


def options_of(script: str, arguments: list[str]) -> argparse.Namespace:
    """What `launch/SCRIPT.py` makes of its arguments, and of a benchmark's own; then it goes no further."""
    main = importlib.import_module(f"launch.{script}").main
    if script == "bench":
        name, *arguments = arguments
        assert name in bench.names(), f"bench.py has no {name}"
        main = importlib.import_module(f"launch.benchmarks.{name}").run

    def stopping(parse):
        def parse_and_stop(parser, *args):
            raise _Parsed(parse(parser, *args))

        return parse_and_stop

    ways = {name: stopping(getattr(Parser, name)) for name in ("parse_args", "parse_intermixed_args")}
    with patch.multiple(Parser, **ways):
        try:
            main(arguments)
        except _Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"launch/{script}.py parsed nothing")


def check_options(script: str, arguments: list[str]) -> None:
    """Also checks what the parser leaves for later and needs no data: settings, and names of datasets and splits."""
    options = vars(options_of(script, arguments))
    if options.get("config"):
        load_config(ROOT / options["config"], options["overrides"])
    for name in (options.get("dataset") or "").split("+"):
        assert not name or name in DATASETS, f"no dataset {name}"
    assert options.get("split") in (None, *SPLITS), options["split"]
