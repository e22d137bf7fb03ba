"""What the parsers of folders have in common: finding the folder, taking images only, reading names whole."""

import re
from collections.abc import Iterable, Iterator

from shards.errors import DataError, examples
from shards.images.listing import list_folder
from shards.storage import Source, join


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


def image_files(source: Source, folder: str) -> list[str]:
    """Sorted paths of the images below a folder; others are told to the source. Raises as `list_folder`."""
    listing = list_folder(source, folder)
    source.left_out.update(listing.left_out)
    return listing.images


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
