"""Features of a whole split, computed by all workers together and held once per node.

    split ── sequential pass ──▶ encoder ──▶ [extract] ──▶ memory map in the split's order ──▶ stage 1, evaluation

Every image is encoded exactly once. Workers of a node map the same file, so 113,346 x 512 floats are held once. What
was encoded goes to the file round by round, so that no worker ever holds more than a round.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipreid.threads import in_threads
from cluster.ranks.team import PATIENCE, Team
from cluster.settings.config import Config
from shards.errors import DataError
from shards.loading.cache import CacheSettings
from shards.loading.index import ShardIndex
from shards.loading.sequential import ImageBatch, OrderedImages, SequentialLoader
from shards.loading.tar_images import TarImages
from shards.storage import naming

ROUND_IMAGES = 4096
"""Images of each worker that are encoded between two exchanges."""
THREAD_IMAGES = 16
"""Images that one thread of a CPU encodes at a time: few, so that few images keep all threads busy."""
Encode = Callable[[Tensor, Tensor], Tensor]
"""uint8 images [b, 3, H, W] and int64 row numbers [b], both on the worker's device -> float [b, width].
Called in several threads on a CPU, without gradient."""
Progress = Callable[[int, int], None]
"""progress(done, total): images done, images in all."""


def no_progress(done: int, total: int) -> None:
    """For passes that nobody looks at."""


@dataclass(frozen=True)
class PassSettings:
    """How a sequential pass reads and encodes images."""

    image_size: tuple[int, int]
    """(H, W), pixels."""
    batch_size: int
    """Images that are read at a time, and on a GPU of one forward pass."""
    num_loaders: int = 0
    """Decoding processes of each worker; 0 decodes in the worker itself."""
    cache_dir: str | None = None
    """Node-local folder, for shards of remote storage and for the features."""
    cache_bytes: int = 50_000_000_000

    @classmethod
    def of(cls, config: Config) -> "PassSettings":
        data = config.data
        return cls(config.model.image_size, config.eval.batch, data.loaders, data.cache_dir, int(data.cache_gb * 1e9))


def extract(
    encode: Encode,
    index: ShardIndex,
    split: str,
    team: Team,
    settings: PassSettings,
    progress: Progress = no_progress,
) -> np.ndarray:
    """float32 [n, width] in the split's row order, memory-mapped and read-only, the same on every rank.

    Raises DataError, on every rank, for an image that cannot be read; its shard and key are named.
    """
    images = TarImages(index, split, settings.image_size, CacheSettings(settings.cache_dir, settings.cache_bytes))
    return extract_images(encode, images, team, settings, progress)


def extract_images(
    encode: Encode,
    images: OrderedImages,
    team: Team,
    settings: PassSettings,
    progress: Progress = no_progress,
) -> np.ndarray:
    """The same for images of a split or a folder."""
    total, batch_size = len(images), settings.batch_size
    assert total, "splits and folders without images are refused before"
    loader = SequentialLoader(
        images,
        rank=team.rank,
        world_size=team.world_size,
        batch_size=batch_size,
        num_loaders=settings.num_loaders,
    )
    size = _forward_images(batch_size, team.device)
    per_round = -(-ROUND_IMAGES // size)
    passes_here = len(loader) * -(-batch_size // size)
    rounds = max(team.all_gather_objects(-(-passes_here // per_round), "rounds of features"))

    def on_images(done_here: int) -> None:
        progress(min(done_here * team.world_size, total), total)  # The ranks go on alike.

    bank: Bank | None = None
    with closing(encode_batches(encode, loader, batch_size, team.device, on_images)) as encoded:
        for _ in range(rounds):
            pieces = _encoded_round(islice(encoded, per_round), team)
            bank = bank or Bank(total, pieces[0][1].shape[1], team, settings.cache_dir)
            bank.add(pieces)
    assert bank is not None, "a round has at least one image"
    return bank.whole()


def encode_batches(
    encode: Encode,
    batches: Iterable[ImageBatch],
    batch_size: int,
    device: torch.device,
    on_images: Callable[[int], None],
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Row numbers int64 [b] and features float32 [b, width], on the CPU, of each batch of up to `batch_size` images.

    On a CPU they are those of pieces of batches: each is encoded by one thread, so that features do not depend on the
    number of threads. on_images: is told how many images are done.
    """
    size, done = _forward_images(batch_size, device), 0

    def work(rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return rows, _encode_padded(encode, rows, images, size, device)

    pieces = (piece for read in batches for piece in zip(read.rows.split(size), read.images.split(size), strict=True))
    with closing(in_threads(work, pieces, device)) as encoded:
        for rows, features in encoded:
            done += len(rows)
            on_images(done)
            yield rows, features


def _forward_images(batch_size: int, device: torch.device) -> int:
    """Images of one forward pass."""
    return min(batch_size, THREAD_IMAGES) if device.type == "cpu" else batch_size


@torch.no_grad()
def _encode_padded(encode: Encode, rows: Tensor, images: Tensor, size: int, device: torch.device) -> Tensor:
    """Features of some images, which are filled up to `size`: one shape for all, so that an image's feature does not
    depend on how many workers share the split."""
    count = len(rows)
    if missing := size - count:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        rows = torch.cat([rows, rows[-1:].expand(missing)])
    encoded = encode(images.to(device, non_blocking=True), rows.to(device, non_blocking=True))
    return encoded[:count].float().cpu()


def _encoded_round(encoded: Iterable[tuple[Tensor, Tensor]], team: Team) -> list[tuple[Tensor, Tensor]]:
    """What every rank has encoded in this round, as (rows, features) in rank order."""
    rows, features, error = torch.empty(0, dtype=torch.int64), torch.empty(0, 0), None
    try:
        if pieces := list(encoded):
            rows, features = map(torch.cat, zip(*pieces, strict=True))
    except DataError as fault:
        error = fault
    of_ranks = team.all_gather_objects((*features.shape, error), "encode images")
    if errors := [fault for *_, fault in of_ranks if fault is not None]:
        raise errors[0]
    if team.world_size == 1:
        return [(rows, features)]
    counts, width = [count for count, *_ in of_ranks], max(width for _, width, _ in of_ranks)
    padded_rows, padded = torch.zeros(max(counts), dtype=torch.int64), torch.zeros(max(counts), width)
    padded_rows[: len(rows)], padded[: len(rows), : features.shape[1]] = rows, features
    with team.within("exchange features", PATIENCE):
        all_rows = team.all_gather(padded_rows.to(team.device)).cpu().split(max(counts))
        all_features = team.all_gather(padded.to(team.device)).cpu().split(max(counts))
    return [(r[:n], f[:n]) for r, f, n in zip(all_rows, all_features, counts, strict=True)]


class Bank:
    """A file of features, float32 [total, width], that the first worker of each node writes and all of them map."""

    def __init__(self, total: int, width: int, team: Team, cache_dir: str | None):
        self.team = team
        nodes = team.all_gather_objects(_node(), "find nodes")
        leader = nodes.index(nodes[team.rank])
        self.leads = team.rank == leader
        path = None
        if self.leads:
            path, self.file = _new_bank(cache_dir, total, width)
        path = team.all_gather_objects(path, "place of features")[leader]
        if not self.leads:
            self.file = np.load(path, mmap_mode="r")
        team.barrier("features mapped")
        if self.leads:
            Path(path).unlink()  # The mappings keep it alive; nothing is left behind however the processes end.

    def add(self, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """Write the (rows, features) of one round."""
        for rows, features in pieces if self.leads else ():
            self.file[rows.numpy()] = features.numpy()

    def whole(self) -> np.ndarray:
        """All rows, read-only, when every rank has come here."""
        self.team.barrier("features written")
        rows = self.file.view()
        rows.flags.writeable = False
        return rows


def _new_bank(cache_dir: str | None, total: int, width: int) -> tuple[str, np.ndarray]:
    """A file with room on its disk for all features: a map that finds none when it is written to ends the process."""
    folder = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="features-", suffix=".npy")
    os.close(descriptor)
    path = Path(name)
    try:
        with naming(path):
            bank = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(total, width))
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except BaseException:
        path.unlink()
        raise
    return str(path), bank


def _node() -> str:
    """Names this machine's file system as its processes see it, which network namespaces of one machine share."""
    return f"{socket.gethostname()}-{Path('/').stat().st_dev}"
