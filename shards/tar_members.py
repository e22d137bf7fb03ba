"""The members of a tar as this project writes them: regular files, each whole, with its bytes behind its header.

    bytes of a shard ──▶ [tar members] ──▶ tar_images (a run of members), verify (one at a time)

A header is a claim. Python's tarfile would fill the holes of a sparse file of a terabyte with zeros, and unpack a
compressed archive: here a member is taken only where the archive holds as many bytes as it says.
"""

import io
import tarfile
from collections.abc import Iterator

READ_ERRORS = (tarfile.TarError, ValueError, OverflowError, LookupError, EOFError, RecursionError, AttributeError)
"""What tarfile raises for damaged headers, its own and those of what it is made of."""


MOST_READS_AT_END = 16
"""tarfile looks for the rest of a sparse file's map behind the end of the archive, without end."""


class BadTar(ValueError):
    """Not a tar of whole regular files; the message is the reason."""


def tar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each member of an uncompressed tar. Raises BadTar, after the members before the fault."""
    try:
        with tarfile.open(fileobj=_Archive(data), mode="r:") as tar:
            for info in tar:
                yield info.name, _content(info, data)
    except BadTar:
        raise
    except READ_ERRORS as error:
        raise BadTar(f"{error.args[0] if error.args else type(error).__name__}".splitlines()[0]) from error


def first_member(block: bytes) -> tuple[tarfile.TarInfo | None, bytes]:
    """The first member and as much of its content as the block holds; (None, b"") where its header is damaged."""
    try:
        with tarfile.open(fileobj=_Archive(block), mode="r:") as tar:
            info = tar.next()
        if info is None or _fault(info):
            return None, b""
        return info, block[info.offset_data :][: info.size]
    except READ_ERRORS:
        return None, b""


def _content(info: tarfile.TarInfo, data: bytes) -> bytes:
    if fault := _fault(info):
        raise BadTar(fault)
    content = data[info.offset_data : info.offset_data + info.size]
    if len(content) < info.size:
        raise BadTar(f"{info.name[:80]!r} is to have {info.size:,} bytes, {len(content):,} are there")
    return content


def _fault(info: tarfile.TarInfo) -> str:
    if not info.isreg() or info.sparse is not None:
        return f"{info.name[:80]!r} is no regular file"
    return f"{info.name[:80]!r} is to have {info.size} bytes" if info.size < 0 else ""


class _Archive(io.BytesIO):
    reads_at_end = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads_at_end += not data
        if self.reads_at_end > MOST_READS_AT_END:
            raise EOFError("ends within a header")
        return data
