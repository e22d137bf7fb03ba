"""Folders and files of this user alone, on a machine that others use as well.

    a place in a shared folder ──▶ [private] ──▶ the node's cache, Ray's token

What others may write to is not trusted: they could put links there that lead our writing elsewhere, or files of their
own. So a folder is closed to them, and what lies in it is opened without following links.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from shards.errors import DataError

FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO
WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def is_private(path: Path) -> bool:
    """Whether it is a folder that nobody else may write to."""
    return not _folder_fault(path.lstat())


def private_folder(path: Path, remedy: str) -> Path:
    """The folder, made where there is none, closed to all others.

    Raises DataError, which ends with the remedy, where another user could have put something there; and OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if fault := _folder_fault(path.lstat()):
            raise DataError(f"{path}: {fault}, so what is in it may be of others: {remedy}") from None
    if path.lstat().st_mode & FOR_OTHERS:
        path.chmod(0o700)
    return path


def open_own(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """A file of this user's, open with flags of `os.open`; a new one is readable for nobody else.

    Raises DataError for a link, for what is no file, and for a file of another user; and OSError.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise _refusal(path, "is not a file but a link or the like") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        os.close(descriptor)
        raise _refusal(path, _owner_fault(found) or "is not a file")
    return os.fdopen(descriptor, "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b")


def _refusal(path: Path, fault: str) -> DataError:
    return DataError(f"{path}: {fault}, in a place that is this program's own: find out who put it there and remove it")


def _folder_fault(found: os.stat_result) -> str:
    if not stat.S_ISDIR(found.st_mode):
        return "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    if found.st_mode & WRITABLE:
        return f"can be written to by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return _owner_fault(found)


def _owner_fault(found: os.stat_result) -> str:
    return f"belongs to user {found.st_uid}, not to {os.getuid()}" if found.st_uid != os.getuid() else ""
