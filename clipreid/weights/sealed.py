"""Safetensors files that carry checksums, and are checked when they are read.

    tensors, metadata ──▶ [dump] ──▶ chunks of a file ──▶ [read_header, check_file] ──▶ whoever reads them

The metadata holds a hash of every tensor's bytes, and one of the header, which that covers. So a reader checks the
header alone, or what it reads. Files of others, and of earlier versions, have neither and are read as they are.
Imports no torch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from clipreid.errors import ModelError

ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
HASHES = "tensors_sha256"
SEAL = "sha256"
PIECE_BYTES = 1 << 26
"""Read at a time."""
MOST_HEADER_BYTES = 100_000_000
"""As of the format's own library."""


class DamagedError(ModelError):
    """A file of ours that is not as it was written."""


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    """As the format calls it: F32, I64, ..."""
    shape: tuple[int, ...]
    read: Callable[[], Iterable[memoryview | bytes]]
    """Its bytes in pieces. Called twice: for the checksum, which stands before the bytes, and for the bytes."""


def dump(
    tensors: Mapping[str, Stored], metadata: Mapping[str, str], *, sealed: bool = True
) -> Iterator[memoryview | bytes]:
    """A file in pieces: its header, then the tensors' bytes, never more than one piece of them at a time.

    sealed: with checksums. Without, where something else has a checksum of the whole file, the tensors are read once.
    """
    # The widest types first, so that every tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-ELEMENT_BYTES[item[1].dtype], item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, stored in ordered:
        start, end = end, end + ELEMENT_BYTES[stored.dtype] * math.prod(stored.shape)
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [start, end]}
    facts = dict(metadata)
    if sealed:
        facts[HASHES] = json.dumps({name: _hash(stored.read()) for name, stored in ordered})
        facts[SEAL] = _seal(header, facts)
    text = json.dumps({"__metadata__": facts, **header}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, stored in ordered:
        yield from stored.read()


def _hash(data: Iterable[memoryview | bytes]) -> str:
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()


class Place(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors."""

    source: str
    metadata: dict[str, str]
    places: dict[str, Place]
    """By name."""
    hashes: dict[str, str] | None
    """Of each tensor's bytes; None in a file that carries none."""

    def check(self, name: str, data: Iterable[memoryview | bytes]) -> None:
        """Raises DamagedError where these pieces are not the bytes of a tensor that were written."""
        if self.hashes is not None and self.hashes.get(name) != _hash(data):
            raise _damaged(self.source, f"{name} has other bytes than were written")


def read_header(path: Path) -> Header:
    """Of a local file. Raises ModelError where it is no whole .safetensors file, DamagedError where one of ours is
    not as it was written."""
    with path.open("rb") as file:
        return _read_header(file, path.stat().st_size, str(path))


def check_file(file: IO[bytes], num_bytes: int, source: str) -> Header:
    """The same of a file at its beginning, and every tensor of one of ours is checked."""
    header = _read_header(file, num_bytes, source)
    if header.hashes is not None:
        for name in header.places:
            check_tensor(file, header, name)
    return header


def check_tensor(file: IO[bytes], header: Header, name: str) -> None:
    """Raises DamagedError where a tensor has other bytes than were written."""
    if header.hashes is not None:
        place = header.places[name]
        header.check(name, read_pieces(file, place.start, place.end))


def read_pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end`, never many at a time."""
    for first in range(start, end, PIECE_BYTES):
        file.seek(first)
        yield file.read(min(PIECE_BYTES, end - first))


def _read_header(file: IO[bytes], num_bytes: int, source: str) -> Header:
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > min(MOST_HEADER_BYTES, num_bytes - 8):
            raise ValueError("its beginning is that of another kind of file, or it was cut short")
        tree = json.loads(file.read(length))
        metadata = tree.pop("__metadata__", {})
        begin = 8 + length
        places = {
            name: Place(facts["dtype"], tuple(facts["shape"]), *(begin + at for at in facts["data_offsets"]))
            for name, facts in tree.items()
        }
        if (end := max((place.end for place in places.values()), default=begin)) != num_bytes:
            raise ValueError(f"its tensors end at byte {end}, there are {num_bytes}")
        sealed = [name in metadata for name in (HASHES, SEAL)]
        sound = all(sealed) and metadata[SEAL] == _seal(tree, metadata)
        hashes = json.loads(metadata[HASHES]) if sound else None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{source}: is not a complete .safetensors file ({error}); copy it again") from None
    if any(sealed) and not sound:
        raise _damaged(source, "the checksum of its header says that it was changed since it was written")
    return Header(source, metadata, places, hashes)


def _seal(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Of all that a header says but this, however it is laid out."""
    rest = {name: text for name, text in metadata.items() if name != SEAL}
    return hashlib.sha256(json.dumps([tensors, rest], sort_keys=True).encode()).hexdigest()


def _damaged(source: str, how: str) -> DamagedError:
    return DamagedError(f"{source}: {how}: the file is damaged; copy it again from where it was written")
