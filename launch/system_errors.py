"""What the operating system refuses, as one line: which file, what happened, what to do.

    OSError of any kind, out of memory ──▶ [system_errors] ──▶ cli

By family, not by a list: an error number that nobody thought of keeps the system's own words. Libraries in C++ drop the
number and keep the words, so those are looked for as well.
"""

import errno
import os
from pathlib import Path

ROOM = "make room there, or name another place"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "name another place, or have its owner give you access",
    errno.EPERM: "name another place, or have its owner give you access",
    errno.EMFILE: "raise the limit (ulimit -n 65536) and repeat the command",
    errno.ENFILE: "close other programs and repeat the command",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path; a folder may have been removed meanwhile",
    errno.EIO: "look after the disk or the connection to it",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
}
BY_WORDS = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOMEM)
"""Looked for by their words in errors without a number."""


def system_mistake(error: BaseException, doing: str) -> str:
    """One line for what the operating system refused; empty for any other error.

    doing: the command, "pack.py build".
    """
    if isinstance(error, MemoryError):
        return f"{doing}: out of memory ({error or 'nothing is left'}): {REMEDIES[errno.ENOMEM]}"
    if isinstance(error, OSError):
        number, words = error.errno, error.strerror or str(error) or type(error).__name__
    elif isinstance(error, RuntimeError | ImportError):
        number = next((number for number in BY_WORDS if os.strerror(number) in str(error)), None)
        words = str(error)
        if number is None:
            return ""
    else:
        return ""
    place = _place(error, number)
    remedy = f": {REMEDIES[number]}" if number in REMEDIES else ""
    return f"{doing}: {place}{_one_line(words)}{remedy}"


def _place(error: BaseException, number: int | None) -> str:
    names = (getattr(error, name, None) for name in ("filename", "filename2"))
    found = [os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names if name is not None]
    if not found and number == errno.ENOENT and not _has_working_folder():
        return "the folder that the command was called in: "
    return f"{' -> '.join(_short(name) for name in found)}: " if found else ""


def _has_working_folder() -> bool:
    try:
        return Path.cwd().is_dir()
    except OSError:
        return False


def _short(name: str) -> str:
    """A path as it can be printed; the middle of a very long one is left out."""
    name = ascii(name)[1:-1] if not name.isprintable() else name
    return name if len(name) <= 400 else f"{name[:200]}…{name[-100:]}"


def _one_line(words: str) -> str:
    line = words.strip().splitlines()[0] if words.strip() else words
    return line[:1].lower() + line[1:] if line[1:2].islower() or line[1:2] == " " else line
