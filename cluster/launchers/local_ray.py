"""A Ray that is started for one run on this machine: heard by nobody else, and nobody else reads its token or files.

    ray ──▶ [local_ray] ──▶ ray.init

By itself Ray listens on every address of the machine, keeps its sessions in a folder that all may write to, and writes
a token that all may read. Who holds the token can run code as the user.
"""

import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.ranks.process import LOOPBACK_ENVIRONMENT
from shards.private import FOR_OTHERS, is_private, private_folder

LOOPBACK = "127.0.0.1"


def is_local() -> bool:
    """Whether no cluster is named that a run is to join."""
    return "RAY_ADDRESS" not in os.environ


def keep_to_loopback() -> None:
    """To be called before Ray is imported. The variable is named after the systems where this is Ray's default: a node
    then knows itself as 127.0.0.1, and its servers listen there alone."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def local_options() -> dict[str, Any]:
    """Arguments of `ray.init` that start such a Ray. Raises DataError where another user holds its place."""
    options: dict[str, Any] = {"address": "local", "_node_ip_address": LOOPBACK}
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if not is_private(place):
        # Ray opens the folder it is given to all: it is one within a closed one. Short, as names of sockets must be.
        closed = private_folder(place / f"ray-{os.getuid()}", "remove it, or set RAY_TMPDIR to a folder of yours")
        options["_temp_dir"] = str(closed / "ray")
    return options


def local_environment() -> dict[str, str]:
    """Of the workers: they are all here."""
    return LOOPBACK_ENVIRONMENT


def ready_token() -> None:
    """Ray's token, where it is a file: made before Ray makes one, for a Ray of our own, and readable by its user alone.

    Raises ConfigError where others can read it, or this user cannot.
    """
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given or "~/.ray/auth_token").expanduser()
    by_file = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and "RAY_AUTH_TOKEN" not in os.environ
    if not by_file or (given and not is_local()):  # a cluster's own way to hand it out
        return
    try:
        if path.exists():
            _check_token(path)
        elif is_local():
            _make_token(path, in_home=not given)
    except OSError as error:
        raise home_mistake(path, error.strerror) from None


def _make_token(path: Path, *, in_home: bool) -> None:
    if in_home and not Path.home().is_dir():
        raise home_mistake(path, f"{Path.home()} is no folder")
    private_folder(path.parent.resolve(), f"chmod 700 {path.parent}, or set HOME to a folder of yours")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def home_mistake(path: object, fault: object) -> ConfigError:
    return ConfigError(
        f"Ray may not read and write {path} ({fault}): it keeps its token below the home folder, {Path.home()}: set "
        "HOME to a folder of yours, or cluster.launcher=local, which needs none"
    )


def _check_token(path: Path) -> None:
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        fault = f"belongs to user {found.st_uid}, not to {os.getuid()}"
    elif found.st_mode & FOR_OTHERS:
        fault = f"can be read by others (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        path.open("rb").close()  # an OSError that names it, where this user cannot read it
        return
    raise ConfigError(
        f"{path}: Ray's token {fault}, and who holds it can run code as you: remove it, and a new one is made; or "
        f"chmod 600 {path} where nobody has read it"
    )
