"""A run's folder on any storage that all nodes see: a local path or an fsspec URL.

    run folder, checkpoints, results of stage 1 ──▶ [storage] ──▶ shards.storage

A file appears under its final name only when it is complete.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from cluster.errors import TrainingError
from shards import storage as files
from shards.sealed import seal, unseal


class Storage:
    """One folder. Names are relative to it, with `/` between parts."""

    def __init__(self, url: str):
        self.url = str(url).rstrip("/")
        self.local_root = files.local_path(self.url)

    def place(self, name: str) -> str:
        return files.join(self.url, name)

    def exists(self, name: str) -> bool:
        return files.exists(self.place(name))

    def names(self, name: str) -> list[str]:
        """Sorted names in a folder; none where there is no such folder."""
        return files.list_folder(self.place(name))

    def read(self, name: str) -> bytes:
        return files.read_bytes(self.place(name))

    def open(self, name: str) -> IO[bytes]:
        """A file to be read in pieces; raises OSError."""
        return files.open_read(self.place(name))

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """durable: as for `shards.storage.write_atomic`."""
        self.write_pieces(name, [content], durable=durable)

    def write_pieces(self, name: str, pieces: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
        """A file of these, one after the other."""
        place = self.place(name)
        files.make_folder(place.rsplit("/", 1)[0])
        with files.write_atomic(place, durable=durable) as file:
            for piece in pieces:
                file.write(piece)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Raises TrainingError, which names the file and the remedy, where the block cannot write."""
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.place(name)} cannot be written ({error}): make room or mend the storage, then repeat the "
                "command, which goes on from the newest checkpoint"
            ) from error

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1).encode() + b"\n")

    def read_sealed(self, name: str) -> dict[str, Any]:
        """What `write_sealed` wrote. Raises OSError, and SealError where it is not that."""
        return unseal(self.read(name))

    def write_sealed(self, name: str, facts: dict[str, Any], *, durable: bool = True) -> None:
        """As JSON with a checksum. durable: as for `write`."""
        self.write(name, json.dumps(seal(facts), indent=1).encode() + b"\n", durable=durable)

    def remove(self, name: str) -> None:
        """A file or folder; nothing happens where it is gone already."""
        files.remove(self.place(name))
