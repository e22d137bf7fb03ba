"""Which files below a folder are images: the one answer for parsers, extraction and the library.

folder, zip or URL ──▶ [image files] ──▶ names of images, and of what is left out
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from shards.errors import DataError, examples
from shards.format import IMAGE_ENDINGS
from shards.images.pictures import START_BYTES, begins_as_image
from shards.storage import Source

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
"""What file managers leave in folders."""


@dataclass(frozen=True)
class Listing:
    """The files below a folder, sorted: those that are images, and those that are not read."""

    images: list[str]
    left_out: list[str]


def describe_left_out(paths: Collection[str]) -> str:
    """One line with their number and up to five; empty where there are none."""
    if not paths:
        return ""
    return f"{len(paths):,} files left out, no images by names and content: {examples(sorted(paths))}"


def list_folder(source: Source, folder: str) -> Listing:
    """What lies below a folder. Raises DataError on names of images that are not UTF-8.

    What file managers and archivers leave behind (`._x`, `.DS_Store`, `__MACOSX/`) is in neither list. An image is a
    file whose name ends as one, or that begins as one; its name does not begin with a dot, nor a folder's above it.
    """
    images: list[str] = []
    left_out: list[str] = []
    for path in source.files(folder):
        *folders, name = path.split("/")  # pathlib would take half the time of parsing a large dataset
        if name in LITTER or name.startswith("._") or "__MACOSX" in folders:
            continue
        stem, dot, ending = name.rpartition(".")
        is_hidden = name.startswith(".") or any(part.startswith(".") for part in folders)
        is_named = bool(stem) and f"{dot}{ending.lower()}" in IMAGE_ENDINGS
        is_image = not is_hidden and (is_named or begins_as_image(source.read_start(path, START_BYTES)))
        (images if is_image else left_out).append(path)
    _require_utf8(source, images)
    return Listing(images, [ascii(path)[1:-1] if not _is_utf8(path) else path for path in left_out])


def list_images(root: str) -> Listing:
    """The images below a folder, zip or URL. Raises DataError where there is none, and as `list_folder`."""
    listing = list_folder(Source(root), "")
    if not listing.images:
        others = f"; {line}" if (line := describe_left_out(listing.left_out)) else ""
        raise DataError(f"{root}: holds no images ({', '.join(IMAGE_ENDINGS)}){others}")
    return listing


def _is_utf8(path: str) -> bool:
    """Python keeps bytes of names that are not UTF-8 as lone surrogates."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_utf8(source: Source, paths: Iterable[str]) -> None:
    odd = [ascii(os.fsencode(path))[2:-1] for path in paths if not _is_utf8(path)]
    if odd:
        raise DataError(
            f"{source.root}: {len(odd):,} names are not UTF-8, so no index can hold them; rename them: {examples(odd)}"
        )
