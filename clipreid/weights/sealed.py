"""Safetensors files that carry checksums, and are checked when they are read.

    tensors, metadata ──▶ [dump] ──▶ chunks of a file ──▶ [read_header, check_file] ──▶ whoever reads them

The metadata holds a hash of every tensor's bytes, and one of the header, which that covers. So a reader checks the
header alone, or what it reads. Files of others, and of earlier versions, have neither and are read as they are.
Imports no torch.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clipreid.errors import ModelError

HASHES = "tensors_sha256"
SEAL = "sha256"
MOST_HEADER_BYTES = 100_000_000
"""As of the format's own library."""


class DamagedError(ModelError):
    """A file of ours that is not as it was written."""


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    """As the format calls it: F32, I64, ..."""
    shape: tuple[int, ...]
    data: memoryview | bytes


def dump(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> list[memoryview | bytes]:
    """A file in chunks: its header, then the tensors' own memory."""
    header: dict[str, Any] = {}
    hashes, chunks, end = {}, [], 0
    # The widest types first, so that every tensor begins at a multiple of its element's size.
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: (-_element_bytes(item[1]), item[0])):
        start, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        hashes[name] = hashlib.sha256(data).hexdigest()
        chunks.append(data)
    facts = {**metadata, HASHES: json.dumps(hashes)}
    text = json.dumps({"__metadata__": {**facts, SEAL: _seal(header, facts)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *chunks]


def _element_bytes(tensor: Stored) -> int:
    return len(tensor.data) // max(math.prod(tensor.shape), 1)


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors."""

    source: str
    metadata: dict[str, str]
    ranges: dict[str, tuple[int, int]]
    """First and last byte of each tensor, behind the header."""
    hashes: dict[str, str] | None
    """Of each tensor's bytes; None in a file that carries none."""

    def check(self, name: str, data: memoryview | bytes) -> None:
        """Raises DamagedError where these are not the bytes of a tensor that were written."""
        if self.hashes is not None and self.hashes.get(name) != hashlib.sha256(data).hexdigest():
            raise _damaged(self.source, f"{name} has other bytes than were written")


def read_header(path: Path) -> Header:
    """Of a local file. Raises ModelError where it is no whole .safetensors file, DamagedError where one of ours is
    not as it was written."""
    with path.open("rb") as file:
        return _read_header(file, path.stat().st_size, str(path))


def check_file(file: BinaryIO, num_bytes: int, source: str) -> Header:
    """The same, and every tensor of one of ours is checked. file: at its beginning."""
    header = _read_header(file, num_bytes, source)
    if header.hashes is not None:
        begin = file.tell()
        for name, (start, end) in header.ranges.items():
            file.seek(begin + start)
            header.check(name, file.read(end - start))
    return header


def check_content(content: bytes, source: str) -> Header:
    """The same for a file that was read whole."""
    return check_file(io.BytesIO(content), len(content), source)


def _read_header(file: BinaryIO, num_bytes: int, source: str) -> Header:
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > min(MOST_HEADER_BYTES, num_bytes - 8):
            raise ValueError("its beginning is that of another kind of file, or it was cut short")
        tree = json.loads(file.read(length))
        metadata = tree.pop("__metadata__", {})
        ranges = {name: tuple(facts["data_offsets"]) for name, facts in tree.items()}
        if (end := max((end for _, end in ranges.values()), default=0)) != num_bytes - 8 - length:
            raise ValueError(f"its tensors take {end} bytes, there are {num_bytes - 8 - length}")
        sealed = [name in metadata for name in (HASHES, SEAL)]
        sound = all(sealed) and metadata[SEAL] == _seal(tree, metadata)
        hashes = json.loads(metadata[HASHES]) if sound else None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{source}: is not a complete .safetensors file ({error}); copy it again") from None
    if any(sealed) and not sound:
        raise _damaged(source, "the checksum of its header says that it was changed since it was written")
    return Header(source, metadata, ranges, hashes)


def _seal(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Of all that a header says but this, however it is laid out."""
    rest = {name: text for name, text in metadata.items() if name != SEAL}
    return hashlib.sha256(json.dumps([tensors, rest], sort_keys=True).encode()).hexdigest()


def _damaged(source: str, how: str) -> DamagedError:
    return DamagedError(f"{source}: {how}: the file is damaged; copy it again from where it was written")
