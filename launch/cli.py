"""What the entry points share: mistakes as one line and exit code 2, arguments, a progress bar.

    command line ──▶ [cli] ──▶ options, Config ──▶ cluster, shards

Imports nothing heavy, so that --help is quick.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from launch.system_errors import system_mistake
from shards.errors import mask_logs, masked

if TYPE_CHECKING:
    from cluster.evaluation.trained import Trained
    from cluster.settings.config import Config

USER_ERRORS = (
    ("shards.errors", "DataError"),
    ("clipreid.errors", "ModelError"),
    ("cluster.errors", "ConfigError"),
)
"""Module and class of what a user can cause. A class whose module is not loaded was not raised."""
USAGE_ERROR = 2
INTERRUPTED = 130


def run(main: Callable[[list[str]], int | None]) -> int:
    """Exit code of main(arguments of the command line): its own (None is 0), 2 after a user's mistake, and where the
    operating system refuses something.

    Either is printed on stderr, `error: ...`, one line a fault; anything else keeps its traceback.
    """
    mask_logs()
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        _let_go_of(sys.stdout)
        return 1
    except Exception as error:
        if not (message := user_mistake(error)):
            raise
        _let_go_of(sys.stdout)
        print(masked("\n".join(f"error: {line}" for line in message.splitlines())), file=sys.stderr)
        return USAGE_ERROR


def end(code: int) -> NoReturn:
    """End the process with this exit code, after its exit functions, without taking Python apart.

    gloo's threads let go of tensors when it suits them. One that needs Python for it when Python is gone aborts the
    process, and a run that has succeeded is reported as failed.
    """
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        _let_go_of(output)
    os._exit(code)


def _let_go_of(output: IO[str]) -> None:
    """What cannot be written there any more is not tried again, with a traceback, when Python ends."""
    try:
        output.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


def user_mistake(error: Exception) -> str:
    """The message of an error that a user can cause, or the operating system; empty for a fault of the program."""
    loaded = [getattr(sys.modules.get(module), name, ()) for module, name in USER_ERRORS]
    if any(isinstance(error, kind) for kind in loaded):
        return str(error)
    return system_mistake(error, command_name(sys.argv))


def command_name(words: list[str]) -> str:
    """ "pack.py build": what was called, without its options."""
    name = Path(words[0]).name if words and words[0] else "python"
    return f"{name} {words[1]}" if len(words) > 1 and words[1].isalpha() else name


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, no abbreviated options, and an epilog kept as it is written."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, masked(f"error: {message} (see {self.prog} --help)\n"))


def add_settings(parser: Parser, *, required: bool = True) -> None:
    """`--config FILE` and overrides, which `load_settings` reads."""
    default = "" if required else "; default: those that the weights were trained with"
    kinds = f"YAML settings, as those in configs/{default}"
    parser.add_argument("--config", required=required, type=place, metavar="FILE", help=kinds)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")


def add_weights(parser: Parser, *, required: bool = True) -> None:
    kinds = "run folder, model.safetensors, a checkpoint of CLIP-ReID's authors, or CLIP weights; also a URL"
    parser.add_argument("--weights", required=required, type=place, metavar="FILE|RUN", help=kinds)


def load_settings(options: argparse.Namespace, trained: "Trained | None" = None) -> "Config":
    """The settings of `add_settings`, with absolute paths. Raises ConfigError with every fault.

    trained: of the weights in use, whose settings they are where no --config is given.
    """
    if trained is not None and not options.config:
        return trained.config(options.overrides)
    from cluster.settings.of_weights import over_those_of_weights
    from cluster.settings.paths import with_absolute_paths
    from cluster.settings.yaml_file import load_tree, parse_config

    return with_absolute_paths(parse_config(over_those_of_weights(load_tree(options.config, options.overrides))))


def place(text: str) -> str:
    """A path or URL, for argparse. The rule for paths: `cluster/settings/paths.py`."""
    from cluster.errors import ConfigError
    from cluster.settings.paths import expanded

    try:
        return expanded(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_place(text: str) -> Path:
    """The same, on this machine."""
    return Path(place(text))


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    return _whole(text, 1, "above 0")


def not_negative(text: str) -> int:
    """A whole number from 0, for argparse."""
    return _whole(text, 0, "from 0")


def _whole(text: str, least: int, words: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {words}")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and below 1, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def check_out(parser: Parser, out: Path, option: str = "--out") -> None:
    """Refuse a place for the result where it could not be written, before the work is done for nothing."""
    if out.is_dir():
        parser.error(f"{option} {out}: is a folder; name a file in it")
    if not out.absolute().parent.is_dir():
        parser.error(f"{option} {out}: no such folder {out.absolute().parent}")
    from shards.storage import require_writable

    try:
        require_writable(out.absolute())
    except OSError as error:
        parser.error(f"{option} {system_mistake(error, 'cannot be written')}")


@contextmanager
def owned_result(out: Path | str, doing: str) -> Iterator[None]:
    """While the block runs, no other command writes this result. torchrun's other processes are of the same command.

    Raises OwnedError, which names the other process.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from shards.owner import owned_file

    with owned_file(str(out.absolute() if isinstance(out, Path) else out), doing):
        yield


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (images done, images in all): a bar with images/s and time left on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} images/s"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None, speed=0.0)

        def update(done: int, total: int) -> None:
            speed = done / max(bar.tasks[task].elapsed or 0.0, 1e-3)
            bar.update(task, completed=done, total=total, speed=speed)

        yield update
