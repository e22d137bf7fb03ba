"""Features of a whole split, computed in parts by all workers and held once per node.

    split ── sequential pass ──▶ encoder ──▶ [extract] ──▶ memory map in the split's order ──▶ stage 1, evaluation

Every image is encoded exactly once. Workers of a node map the same file, so 113,346 x 512 floats are held once.
"""

import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.team import PATIENCE, Team
from shards.index import ShardIndex
from shards.sequential import ImageBatch, SequentialLoader

CHUNK_ROWS = 4096
Encode = Callable[[Tensor, Tensor], Tensor]
"""uint8 images [b, 3, H, W] and int64 row numbers [b], both on the worker's device -> float [b, width]."""


def extract(
    encode: Encode,
    index: ShardIndex,
    split: str,
    team: Team,
    *,
    image_size: tuple[int, int],
    batch: int,
    loaders: int = 0,
    cache_dir: str | None = None,
    cache_gb: float = 50.0,
    on_images: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """float32 [n, width] in the split's row order, memory-mapped and read-only, the same on every rank.

    `on_images` is told how many images this rank has encoded in all.

    Raises:
        DataError: an image cannot be read; its shard and key are named.
    """
    loader = SequentialLoader(
        index, split, image_size=image_size, rank=team.rank, world_size=team.world_size, batch_size=batch,
        workers=loaders, cache_dir=cache_dir, cache_bytes=int(cache_gb * 1e9),
    )  # fmt: skip
    own_rows, own = encode_batches(encode, loader, batch, team.device, on_images)
    return _share(own_rows, own, len(index.split(split).labels), team, cache_dir)


@torch.no_grad()
def encode_batches(
    encode: Encode,
    batches: Iterable[ImageBatch],
    batch: int,
    device: torch.device,
    on_images: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor | None]:
    """Row numbers int64 [n] and features float32 [n, width], on the CPU, of batches of up to `batch` images.

    None in place of the features where there is no image.
    """
    rows, features = [], []
    done = 0
    for part in batches:
        features.append(_encode_padded(encode, part, batch, device))
        rows.append(part.rows)
        done += len(part.rows)
        on_images(done)
    if not features:
        return torch.empty(0, dtype=torch.int64), None
    return torch.cat(rows), torch.cat(features)


def _encode_padded(encode: Encode, part: ImageBatch, batch: int, device: torch.device) -> Tensor:
    """Features of one batch, which is filled up to `batch` images: one shape for all, so that an image's feature
    depends as little as possible on how many workers share the split."""
    missing = batch - len(part.rows)
    images = torch.cat([part.images, part.images[-1:].expand(missing, -1, -1, -1)]) if missing else part.images
    rows = torch.cat([part.rows, part.rows[-1:].expand(missing)]) if missing else part.rows
    encoded = encode(images.to(device, non_blocking=True), rows.to(device, non_blocking=True))
    return encoded[: len(part.rows)].float().cpu()


def _share(own_rows: Tensor, own: Tensor | None, total: int, team: Team, cache_dir: str | None) -> np.ndarray:
    """Exchange all ranks' rows chunk by chunk; the first worker of each node writes them to a file all map."""
    sizes = team.collect((len(own_rows), 0 if own is None else own.shape[1]), "size of features")
    width = max(size[1] for size in sizes)
    own = torch.empty(0, width) if own is None else own
    nodes = team.collect(_node(), "find nodes")
    leader = nodes.index(nodes[team.rank])
    path = team.collect(_bank_path(cache_dir) if team.rank == leader else None, "place of features")[leader]
    bank = None
    if team.rank == leader:
        bank = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(total, width))
    for start in range(0, max(size[0] for size in sizes), CHUNK_ROWS):
        for rows, features in _exchange(own_rows, own, start, sizes, team):
            if bank is not None and len(rows):
                bank[rows.numpy()] = features.numpy()
    if bank is not None:
        bank.flush()
    team.wait("features written")
    mapped = np.load(path, mmap_mode="r")
    team.wait("features mapped")
    if team.rank == leader:
        Path(path).unlink()  # The mappings keep it alive; nothing is left behind when the processes end.
    return mapped


def _exchange(own_rows: Tensor, own: Tensor, start: int, sizes: list[tuple[int, int]], team: Team):
    """Every rank's rows start … start + CHUNK_ROWS, as (rows, features) pairs in rank order."""
    counts = [min(max(size[0] - start, 0), CHUNK_ROWS) for size in sizes]
    part = slice(start, start + counts[team.rank])
    if team.world_size == 1:
        return [(own_rows[part], own[part])]
    largest = max(counts)
    rows, features = torch.zeros(largest, dtype=torch.int64), torch.zeros(largest, own.shape[1])
    rows[: counts[team.rank]], features[: counts[team.rank]] = own_rows[part], own[part]
    with team.joining("exchange features", PATIENCE):
        all_rows = team.gather(rows.to(team.device)).cpu().split(largest)
        all_features = team.gather(features.to(team.device)).cpu().split(largest)
    return [(r[:n], f[:n]) for r, f, n in zip(all_rows, all_features, counts, strict=True)]


def _bank_path(cache_dir: str | None) -> str:
    folder = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile(dir=folder, prefix="features-", suffix=".npy", delete=False).name


def _node() -> str:
    """Names this machine's file system as its processes see it, which network namespaces of one machine share."""
    return f"{socket.gethostname()}-{Path('/').stat().st_dev}"
