"""One picture: the bytes of an image file -> the pixels that a person sees.

    image file ──▶ [pictures] ──▶ pack, verify, loaders, extraction of folders, contact sheets, figures

All that reads an image reads it here, so it has the same pixels everywhere, or the same fault:

    turned     as its EXIF orientation says
    scaled     from more than 8 bits a channel to 8; never clipped
    composed   on white where it is transparent; of a file with several pictures the first is taken
    whole      what the decoder warns of is a fault: half a JPEG is no picture

Neither torch nor shards are needed for it.
"""

import hashlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards.format import IMAGE_FORMATS

BACKGROUND = (255, 255, 255)
"""White: what transparent pixels are composed on."""
MAX_PIXELS = 89_478_485
"""Width times height of the largest image that is decoded, which takes 270 MB: where Pillow begins to warn."""

TURNED = "turned upright (EXIF orientation)"
SCALED = "scaled to 8 bits a channel"
COMPOSED = "transparent, composed on white"
CONVERTED = "converted to RGB from other colours (CMYK, LAB, ...)"
FIRST = "with several pictures in a file, the first taken"
CHANGES = (TURNED, SCALED, COMPOSED, CONVERTED, FIRST)

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"
EXIF_START = b"Exif\0\0"
ORIENTATION_TAG = 0x0112
OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image: fetch it with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the image: fetch it with `git annex get`"),
    (b"<!doctype html", "an HTML page, not an image: download the image again"),
    (b"<html", "an HTML page, not an image: download the image again"),
    (b"<?xml", "an XML file (SVG?), not an image of pixels"),
    (b"<svg", "an SVG drawing, not an image of pixels"),
    (b"%pdf", "a PDF file, not an image"),
    (b"%!ps", "a PostScript file, not an image"),
    (b"pk\x03\x04", "a zip file, not an image"),
    (b"\x1f\x8b", "a gzip file, not an image"),
)
"""How files begin, in lower case, that stand in an image's place by mistake."""
_pillow = threading.Lock()  # Python's warnings are those of the whole process


IMAGE_STARTS = (JPEG_START, PNG_START, b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
"""How images begin that nothing else begins like: JPEG, PNG, GIF, TIFF twice, JPEG 2000 twice."""
START_BYTES = 16
"""That `begins_as_image` has to see."""


class BadPicture(ValueError):
    """The bytes are no whole image; the message is the reason."""


class Picture(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """uint8 [height, width, 3], RGB, upright."""
    format: str
    """One of IMAGE_FORMATS."""
    stored_size: tuple[int, int]
    """(width, height) as the file says, before it was turned."""
    changes: tuple[str, ...]
    """What was done to it, of CHANGES."""


def read_picture(data: bytes | np.ndarray) -> Picture:
    """Decode an image file, given as bytes or uint8 [size]. Raises BadPicture unless it is whole.

    The format is told by the content. Sizes are checked before memory is taken for the pixels.
    """
    if bytes(data[:3]) == JPEG_START:
        return _read_jpeg(data)
    return _read_by_pillow(bytes(data))


def pixel_hash(pixels: np.ndarray) -> str:
    """Equal for equal pixels of equal size, whatever file they were stored in."""
    digest = hashlib.sha1(repr(pixels.shape).encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadPicture(f"{width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are read")


# ---- JPEG: libjpeg-turbo, through simplejpeg, which raises what libjpeg warns of


def _read_jpeg(data: Any) -> Picture:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        changes: tuple[str, ...] = ()
        if colours in ("CMYK", "YCCK"):
            changes, pixels = (CONVERTED,), _cmyk_to_rgb(simplejpeg.decode_jpeg(data, "CMYK"))
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
    except BadPicture:
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        if "subsampling" in str(error):  # such are rare, and simplejpeg does not take them
            return _read_odd_jpeg(bytes(data))
        raise BadPicture(f"JPEG: {error}") from error
    return _turned(pixels, _jpeg_orientation(memoryview(data)), "JPEG", (width, height), changes)


def _read_odd_jpeg(data: bytes) -> Picture:
    """A JPEG whose colours are sampled in a way that simplejpeg does not know. Pillow drops libjpeg's warnings.

    Half a JPEG shows in that its pixels depend on what is put before its end.
    """
    end = data.rfind(JPEG_END)
    if end < 0:
        raise BadPicture("JPEG: its end is missing")
    one, other = (_read_by_pillow(data[:end] + bytes([fill]) * 1024 + data[end:]) for fill in (0x00, 0x5A))
    if not np.array_equal(one.pixels, other.pixels):
        raise BadPicture("JPEG: premature end of its data")
    return _read_by_pillow(data)


def _cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    """Inverted CMYK, as JPEGs hold it, uint8 [height, width, 4] -> RGB: each of C, M, Y times K, rounded."""
    product = cmyk[..., :3].astype(np.uint32) * cmyk[..., 3:] + 128
    return ((product + (product >> 8)) >> 8).astype(np.uint8)


def _jpeg_orientation(data: memoryview) -> int:
    """From the EXIF segment before the pixels; 1 (upright) where there is none."""
    place, end = 2, len(data) - 4
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:  # the pixels follow
            return 1
        if marker == 0xFF:  # filling
            place += 1
            continue
        size = data[place + 2] << 8 | data[place + 3]
        if marker == 0xE1 and bytes(data[place + 4 : place + 10]) == EXIF_START:
            return _orientation(bytes(data[place + 10 : place + 2 + size]))
        place += 2 + size
    return 1


def _orientation(exif: bytes) -> int:
    """1 ... 8 from EXIF data, which begins with a TIFF header; 1 where it says none or cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == ORIENTATION_TAG:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:  # cut short
        pass
    return 1


def _turned(
    pixels: np.ndarray, orientation: int, file_format: str, stored_size: tuple[int, int], changes: tuple[str, ...]
) -> Picture:
    if orientation != 1:
        changes = (TURNED, *changes)
        pixels = pixels.transpose(1, 0, 2) if orientation > 4 else pixels  # 5 to 8: the first row is a side
        if orientation in (2, 3, 6, 7):
            pixels = pixels[:, ::-1]
        if orientation in (3, 4, 7, 8):
            pixels = pixels[::-1]
        pixels = np.ascontiguousarray(pixels)
    return Picture(pixels, file_format, stored_size, changes)


# ---- all other formats: Pillow


def begins_as_image(start: bytes) -> bool:
    """Whether a file is an image by its first START_BYTES bytes, whatever its name. BMP, PPM and the like begin with so
    little that text can begin like them: these are told by their names."""
    in_container = (start[:4], start[8:12]) == (b"RIFF", b"WEBP") or start[4:12] in (b"ftypavif", b"ftypavis")
    return start.startswith(IMAGE_STARTS) or in_container


def picture_of(image: Image.Image) -> Picture:
    """The picture in an image that Pillow has opened, as if its file had been read. Raises as `read_picture`.

    The image stays as it is, but for being loaded. What others did to its pixels counts, as long as they left its EXIF
    orientation true: `ImageOps.exif_transpose` does.
    """
    return _by_pillow(lambda: _upright(image), b"")


def _read_by_pillow(data: bytes) -> Picture:
    if data.startswith(PNG_START):
        _check_png(data)

    def read() -> Picture:
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)) as image:
            return _upright(image)

    return _by_pillow(read, data)


def _by_pillow(read: Callable[[], Picture], data: bytes) -> Picture:
    """What `read` makes of the file `data`. Raises BadPicture for all that Pillow raises or warns of."""
    with _pillow, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            picture = read()
        except BadPicture:
            raise
        except UnidentifiedImageError as error:  # its message names the object that held the bytes
            raise BadPicture(_what_it_is(data)) from error
        except Image.DecompressionBombError as error:
            raise BadPicture(f"more pixels than the {MAX_PIXELS:,} that are read") from error
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for broken files
            raise BadPicture(f"{error or type(error).__name__}".splitlines()[0]) from error
    if faults := [str(one.message) for one in told if issubclass(one.category, (UserWarning, RuntimeWarning))]:
        raise BadPicture(f"{picture.format}: {faults[0].splitlines()[0]}")
    return picture


def _upright(image: Image.Image) -> Picture:
    _check_size(*image.size)
    stored_size = image.size
    deep = ";16" in str(getattr(image, "tile", "")) or (image.format, image.mode) == ("PPM", "I")
    tiff_orientation = getattr(image, "tag_v2", {}).get(ORIENTATION_TAG, 1)
    several = getattr(image, "is_animated", False)
    image.load()  # and what a PNG says behind its pixels
    orientation = _orientation(image.info.get("exif", b"").removeprefix(EXIF_START))
    pixels, changes = _to_rgb(image, deep)
    if image.format == "TIFF":  # turned by Pillow
        orientation, changes = 1, changes + ((TURNED,) if tiff_orientation in range(2, 9) else ())
    changes += (FIRST,) if several else ()
    return _turned(pixels, orientation, image.format or "", stored_size, changes)


def _check_png(data: bytes) -> None:
    """Pillow does not look at the checksums of the pixels."""
    place = len(PNG_START)
    while place < len(data):
        size, name = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end = place + 8 + size
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise BadPicture(f"PNG: the checksum of its part {name.decode('latin-1')!r} is wrong")
        if name == b"IEND":
            return
        place = end + 4
    raise BadPicture("PNG: its end is missing")


def _to_rgb(image: Image.Image, deep: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels of a loaded image, uint8 [height, width, 3], and what was done to them, of CHANGES.

    deep: the file has 16 bits a channel, of which Pillow keeps the upper 8 unless the image is a grey one.
    """
    if image.mode == "CMYK":  # as a JPEG holds it, whatever file it is in
        return _cmyk_to_rgb(255 - np.asarray(image)), (CONVERTED,)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        grey = _to_8_bits(values, deep or image.mode.startswith("I;16"))
        pixels = np.repeat(grey[..., None], 3, axis=2)
        hidden = image.info.get("transparency")
        if isinstance(hidden, int) and (values == hidden).any():
            pixels[values == hidden] = BACKGROUND
            return pixels, (SCALED, COMPOSED)
        return pixels, (SCALED,)
    changes: tuple[str, ...] = (SCALED,) if deep else ()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            changes += (COMPOSED,)
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    elif image.mode not in ("RGB", "L", "P", "1", "RGBX"):
        changes += (CONVERTED,)
    return np.array(image.convert("RGB")), changes


def _to_8_bits(values: np.ndarray, has_16_bits: bool) -> np.ndarray:
    """Grey values of more than 8 bits, [height, width] -> uint8.

    16 bits: the upper 8, as Pillow takes them of colours. Other numbers say nothing of their range. It is taken to be
    0 ... 1 (fractions only), 0 ... 255 or 0 ... 2^16 - 1 where they lie in it, and else from the smallest, 0 at
    most, to the largest.
    """
    if has_16_bits and values.min() >= 0:
        return (values.astype(np.int64) >> 8).astype(np.uint8)
    if not np.isfinite(values).all():
        raise BadPicture("has pixels that are no number (NaN) or infinite")
    low, high = min(float(values.min()), 0.0), float(values.max())
    ranges = (1, 255, 2**16 - 1) if values.dtype.kind == "f" else (255, 2**16 - 1)
    limit = next((limit for limit in ranges if low == 0 and high <= limit), max(high, low + 1))
    return np.rint((values.astype(np.float64) - low) * (255 / (limit - low))).astype(np.uint8)


def _what_it_is(data: bytes) -> str:
    """Of bytes that are no image."""
    if not data:
        return "the file is empty"
    if not data.strip(b"\0"):
        return "nothing but zeros: its content was lost"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, name in OTHER_FILES:
        if start.startswith(beginning):
            return name
    if data[4:8] == b"ftyp":
        return f"a file of kind {data[8:12].decode('latin-1').strip()} (HEIC, a video?), which is not read"
    known = ", ".join(IMAGE_FORMATS)
    return f"not an image of a known format ({known})"
