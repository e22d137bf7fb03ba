"""Arrays in one file that all processes of a node map, each array checked when a process first uses it.

    index.parquet ──▶ [array file] ──▶ index

    arrays, each at a multiple of 64 bytes | contents, as JSON | length and CRC-32 of the contents

To open a file only its contents are read, however long the arrays are. Every array carries a CRC-32, and so do the
contents, which say where the arrays lie: a bit that is another one is found before anybody sees what it changed.
"""

import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from shards.private import open_own

ALIGNMENT = 64
END = struct.Struct("<QI")


class DamagedFile(Exception):
    """Not as it was written."""


class ArrayWriter:
    """Writes arrays one after the other, so that no two of them are in memory at a time."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._place = 0
        self._arrays: dict[str, dict[str, Any]] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).view(np.uint8).data
        padding = bytes(-len(data) % ALIGNMENT)
        start, self._place = self._place, self._place + len(data) + len(padding)
        self._arrays[name] = {
            "dtype": values.dtype.str,
            "length": len(values),
            "bytes": [start, self._place],
            "crc32": zlib.crc32(padding, zlib.crc32(data)),
        }
        self._file.write(data)
        self._file.write(padding)

    def add_strings(self, name: str, values: pa.LargeStringArray) -> None:
        """Without nulls, and not a slice of others."""
        _, ends, text = values.buffers()
        offsets = np.frombuffer(ends, np.int64, len(values) + 1) if len(values) else np.zeros(1, np.int64)
        self.add(f"{name}.offsets", offsets)
        self.add(f"{name}.text", np.frombuffer(text or b"", np.uint8, int(offsets[-1])))

    def finish(self, facts: dict[str, Any]) -> None:
        """facts: JSON that `ArrayFile.facts` gives back."""
        contents = json.dumps({"facts": facts, "arrays": self._arrays}).encode()
        self._file.write(contents + END.pack(len(contents), zlib.crc32(contents)))


class ArrayFile:
    """What an `ArrayWriter` wrote, mapped. Arrays are read-only, and keep the map alive."""

    def __init__(self, path: Path):
        """Raises OSError where there is no such file, DamagedFile where its contents are damaged, DataError where it is
        not a file of this user's."""
        with open_own(path) as file:
            state = os.fstat(file.fileno())
            if state.st_size < END.size:
                raise DamagedFile(f"{path}: cut short")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path, self._identity = path, (state.st_dev, state.st_ino)
        end = state.st_size - END.size
        length, checksum = END.unpack(self._data[end:])
        contents = self._data[max(end - length, 0) : end]
        if zlib.crc32(contents) != checksum:
            raise DamagedFile(f"{path}: its contents are damaged")
        known = json.loads(contents)
        self.facts: dict[str, Any] = known["facts"]
        self._arrays: dict[str, dict[str, Any]] = known["arrays"]
        self._checked: dict[str, np.ndarray] = {}

    def is_same(self, other: "ArrayFile") -> bool:
        """Whether it is one file under one name, and not another one that took the name since."""
        return self._identity == other._identity

    def array(self, name: str) -> np.ndarray:
        """Raises DamagedFile."""
        if name not in self._checked:
            entry = self._arrays[name]
            data = memoryview(self._data)[slice(*entry["bytes"])]
            if zlib.crc32(data) != entry["crc32"]:
                raise DamagedFile(f"{self.path}: {name} is damaged")
            self._checked[name] = np.frombuffer(data, entry["dtype"], entry["length"])
        return self._checked[name]

    def strings(self, name: str) -> pa.LargeStringArray:
        """Raises DamagedFile."""
        offsets, text = self.array(f"{name}.offsets"), self.array(f"{name}.text")
        return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))
