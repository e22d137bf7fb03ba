"""What happens to files that nobody writes: other bits, and a power loss that takes what was not on the disk yet."""

import os
import random
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


def flips(content, count=None, seed=0):
    """The content with one bit the other way round: every bit in turn, or `count` of them at random."""
    bits = range(8 * len(content))
    for bit in bits if count is None else random.Random(seed).sample(bits, min(count, len(bits))):
        yield content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


TORN = {
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "cut": lambda content: content[: len(content) // 2],
}
RUBBISH = [b"", b"\0" * 40, b"[]", b"7", b'"text"', b"null", b"\xff\xfe{}", b"{", b"[" * 100_000]
"""What was once found in place of JSON."""


class Disk:
    """What of a folder is on the disk, by what was flushed to it; and all that a power loss could leave of it, at every
    moment at which the program renames, removes or flushes something."""

    def __init__(self, root):
        self.root = Path(root)
        self.moments = []
        """(what was said to be safe by then, {path: content} of each outcome)."""
        self.safe = None
        self._contents = {}  # by inode
        self._names = {self.root: {}}  # {folder: {name: content, None for one of which nothing is known, or a folder}}

    @contextmanager
    def watched(self):
        replace, unlink, fsync = Path.replace, os.unlink, os.fsync

        def watched_replace(path, target):
            self._moment()
            return replace(path, target)

        def watched_unlink(path, **options):
            self._moment()
            return unlink(path, **options)

        def watched_fsync(descriptor):
            self._moment()
            self._flushed(Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_ino)
            return fsync(descriptor)

        with (
            patch.object(Path, "replace", watched_replace),
            patch.object(os, "unlink", watched_unlink),
            patch.object(os, "fsync", watched_fsync),
        ):
            yield self
        self._moment()

    def _flushed(self, path, inode):
        if path.is_dir():
            entries = {entry.name: entry for entry in path.iterdir()}
            self._names[path] = {n: None if e.is_dir() else self._content(e) for n, e in entries.items()}
        else:
            self._contents[inode] = path.read_bytes()

    def _content(self, path):
        """What of a file is on the disk, None where that is nobody's guess."""
        content = path.read_bytes()
        return content if self._contents.get(path.stat().st_ino) == content else None

    def _moment(self):
        live = [path for path in self.root.rglob("*") if path.is_file()]
        for tear in TORN.values():
            torn = {p: p.read_bytes() if self._content(p) is not None else tear(p.read_bytes()) for p in live}
            self.moments.append((self.safe, torn))
        self.moments.append((self.safe, dict(self._durable(self.root))))

    def _durable(self, folder):
        """The names that are there for certain."""
        for name, content in self._names.get(folder, {}).items():
            if folder / name in self._names:
                yield from self._durable(folder / name)
            elif content is not None:
                yield folder / name, content

    def outcomes(self, place):
        """Lay every outcome out at `place`, one after the other: (what was safe, the folder)."""
        seen = set()
        for number, (safe, files) in enumerate(self.moments):
            key = safe, tuple(sorted((str(path), content) for path, content in files.items()))
            if key in seen:
                continue
            seen.add(key)
            folder = Path(place) / str(number)
            folder.mkdir(parents=True)
            for path, content in files.items():
                target = folder / path.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            yield safe, folder
