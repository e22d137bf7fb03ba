"""What the parsers of folders have in common: finding the folder, taking images only, reading names whole."""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from shards.errors import DataError, examples
from shards.format import IMAGE_ENDINGS
from shards.storage import Source, join

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
"""What file managers leave in folders."""


def find_base(source: Source, candidates: Iterable[str], needed: Iterable[str]) -> str:
    """The first candidate folder ("" = the root itself) that holds everything needed; "BASE/" or "".

    Raises DataError naming what is missing in the candidate that comes nearest.
    """
    needed = list(needed)
    missing = {}
    for folder in candidates:
        base = f"{folder}/" if folder else ""
        missing[base] = [name for name in needed if not source.has(base + name)]
        if not missing[base]:
            return base
    base = min(missing, key=lambda name: len(missing[name]))
    raise DataError(
        f"{source.root}: not the expected layout; missing {', '.join(base + name for name in missing[base])}"
    )


@dataclass(frozen=True)
class Listing:
    """The files below a folder, sorted: those that are images, and those that are not read."""

    images: list[str]
    left_out: list[str]


def describe_left_out(paths: Collection[str]) -> str:
    """One line with their number and up to five; empty where there are none."""
    if not paths:
        return ""
    return f"{len(paths):,} files left out, no images by their names: {examples(sorted(paths))}"


def list_folder(source: Source, folder: str) -> Listing:
    """What lies below a folder. Raises DataError on names of images that are not UTF-8.

    What file managers and archivers leave behind (`._x`, `.DS_Store`, `__MACOSX/`) is in neither list. An image is a
    file whose name ends as one and does not begin with a dot, nor a folder's above it.
    """
    images: list[str] = []
    left_out: list[str] = []
    for path in source.files(folder):
        *folders, name = path.split("/")  # pathlib would take half the time of parsing a large dataset
        if name in LITTER or name.startswith("._") or "__MACOSX" in folders:
            continue
        stem, dot, ending = name.rpartition(".")
        is_image = stem and f"{dot}{ending.lower()}" in IMAGE_ENDINGS
        is_hidden = name.startswith(".") or any(part.startswith(".") for part in folders)
        (images if is_image and not is_hidden else left_out).append(path)
    _require_utf8(source, images)
    return Listing(images, [ascii(path)[1:-1] if not _is_utf8(path) else path for path in left_out])


def image_files(source: Source, folder: str) -> list[str]:
    """Sorted paths of the images below a folder; others are told to the source. Raises as `list_folder`."""
    listing = list_folder(source, folder)
    source.left_out.update(listing.left_out)
    return listing.images


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


def match_names(
    source: Source, paths: Iterable[str], pattern: re.Pattern, expected: str, below: str = ""
) -> Iterator[tuple[str, re.Match]]:
    """Each path with the match of its part after `below`; the pattern must fit the whole of it.

    Raises DataError after the last path, listing up to five names that do not fit and the expected form.
    """
    odd = []
    for path in paths:
        if match := pattern.fullmatch(path.removeprefix(below)):
            yield path, match
        else:
            odd.append(path)
    if odd:
        raise DataError(f"{source.root}: names not of the form {expected}: {examples(odd)}")


def require_listed(source: Source, listed: Iterable[str], present: Iterable[str], list_name: str) -> None:
    """Raise DataError when a list names images that are not there, naming up to five."""
    present = set(present)
    missing = [path for path in listed if path not in present]
    if missing:
        raise DataError(
            f"{join(source.root, list_name)}: lists images that are not there: {examples(missing)}; "
            "the copy is probably incomplete"
        )
