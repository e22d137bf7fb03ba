"""open_clip, without the libraries that it brings along for towers which are none of ours.

    open_clip ──▶ [clip_library] ──▶ prompts, weights.initial

Where timm or transformers are installed open_clip imports them, for image and text towers of theirs, which
`clipreid.model.arch` refuses: seconds of a worker's start, and memory of every worker, for nothing. It does without
what it does not find.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("timm", "transformers")


@contextmanager
def _not_found(*names: str) -> Iterator[None]:
    """Within it these libraries cannot be imported, unless they have been already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is how Python marks what is not there.
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _not_found(*UNUSED):
    import open_clip

__all__ = ["open_clip"]
