"""One table of odd files: build, verify, extraction of folders and the loaders agree on each, pixel by pixel."""

import io
import struct
import warnings
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from shards.errors import DataError
from shards.format import IMAGE_ENDINGS
from shards.images.listing import list_images
from shards.images.pictures import MAX_PIXELS, BadPicture, read_picture
from shards.loading.decode import decode, resize_into
from shards.loading.folder_images import FolderImages
from shards.loading.index import ShardIndex
from shards.loading.tar_images import TarImages
from shards.packing import writer
from shards.packing.build import build
from shards.packing.contact_sheet import _read
from shards.packing.verify import verify
from shards.source import ShardSource
from tests.helpers.layouts import write

WIDTH, HEIGHT = 48, 64
SIZE = (32, 24)  # of the loaders' images
rng = np.random.default_rng(0)
SCENE = Image.fromarray(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
GREY = SCENE.convert("L")
LEVELS = np.asarray(GREY)
WHITE = Image.new("RGB", SCENE.size, "white")
MASK = Image.fromarray(np.uint8(np.hypot(*np.indices((HEIGHT, WIDTH)) - np.array([[[32]], [[24]]])) < 20) * 255)
CUT_OUT = Image.composite(SCENE, WHITE, MASK)
"""What a person sees of the scene where all but a disc is transparent."""
NOISE = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
HIDING = Image.composite(SCENE, NOISE, MASK)
HIDING.putalpha(MASK)


def stored(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(orientation, kind="JPEG", **settings):
    """The scene as a camera held otherwise stores it, with the EXIF tag that tells how to turn it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = SCENE if orientation == 1 else SCENE.transpose(undo[orientation])
    return stored(image, kind, exif=exif, **settings)


def with_chunk(png, name, content):
    """A PNG with one more chunk, before its pixels."""
    place = png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:place] + chunk + png[place:]


JPEG = stored(SCENE, "JPEG", quality=95)
NOISY = stored(NOISE, "JPEG", quality=95)
PNG = stored(SCENE, "PNG")
GIF = stored(SCENE, "GIF")
AS_16_BITS = LEVELS.astype(np.uint16) * 257
FRAMES = {"save_all": True, "append_images": [WHITE], "duration": 100}
FILL_16 = stored(Image.fromarray(np.where(np.asarray(MASK) > 0, np.minimum(AS_16_BITS, 65534), 65535)), "PNG")
SIGNED = Image.fromarray((LEVELS.astype(np.int32) - LEVELS.min()) * 2**15 - 2**22)
STRETCHED = np.rint((LEVELS - LEVELS.min()) * (255 / np.ptp(LEVELS)))

WHOLE = {
    "plain.jpg": (JPEG, SCENE),
    "grey.jpg": (stored(GREY, "JPEG", quality=95), GREY),
    "progressive.jpg": (stored(SCENE, "JPEG", quality=95, progressive=True), SCENE),
    "restarts.jpg": (stored(SCENE, "JPEG", quality=95, restart_marker_blocks=2), SCENE),
    "behind.jpg": (JPEG + bytes(37), SCENE),
    "cmyk.jpg": (stored(SCENE.convert("CMYK"), "JPEG", quality=95), SCENE),
    "cmyk_420.jpg": (stored(SCENE.convert("CMYK"), "JPEG", quality=95, subsampling=2), SCENE),
    **{f"turned_{n}.jpg": (turned(n, quality=95), SCENE) for n in range(1, 9)},
    "turned_6.png": (turned(6, "PNG"), SCENE),
    "turned_8.webp": (turned(8, "WEBP", lossless=True), SCENE),
    "turned_6.tif": (turned(6, "TIFF"), SCENE),
    "bad_exif.jpg": (turned(6, quality=95).replace(b"MM\0*", b"XX\0*"), SCENE.transpose(2)),
    "cut_exif.jpg": (stored(SCENE, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\0"), SCENE),
    "plain.png": (PNG, SCENE),
    "bits.png": (stored(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "palette.png": (stored(SCENE.quantize(64), "PNG"), SCENE.quantize(64)),
    "grey.png": (stored(GREY, "PNG"), GREY),
    "grey_16.png": (stored(Image.fromarray(AS_16_BITS), "PNG"), GREY),
    "grey_16.tif": (stored(Image.fromarray(AS_16_BITS), "TIFF"), GREY),
    "grey_16.pgm": (stored(Image.fromarray(AS_16_BITS), "PPM"), GREY),
    "grey_16_hidden.png": (
        with_chunk(FILL_16, b"tRNS", b"\xff\xff"),
        Image.composite(GREY, Image.new("L", GREY.size, 255), MASK),
    ),
    "int_32.tif": (stored(Image.fromarray(AS_16_BITS.astype(np.int32)), "TIFF"), GREY),
    "signed_32.tif": (stored(SIGNED, "TIFF"), Image.fromarray(STRETCHED.astype(np.uint8))),
    "fractions.tif": (stored(Image.fromarray(LEVELS.astype(np.float32) / 255), "TIFF"), GREY),
    "floats.tif": (stored(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"), GREY),
    "large_floats.pfm": (stored(Image.fromarray(AS_16_BITS.astype(np.float32)), "PPM"), GREY),
    "opaque.png": (stored(SCENE.convert("RGBA"), "PNG"), SCENE),
    "cut_out.png": (stored(HIDING, "PNG"), CUT_OUT),
    "cut_out.webp": (stored(HIDING, "WEBP", lossless=True, exact=True), CUT_OUT),
    "cut_out.tif": (stored(HIDING, "TIFF"), CUT_OUT),
    "grey_alpha.png": (
        stored(Image.merge("LA", (GREY, MASK)), "PNG"),
        Image.composite(GREY, Image.new("L", GREY.size, 255), MASK),
    ),
    "half_seen.png": (stored(Image.merge("RGBA", (*SCENE.split(), Image.new("L", SCENE.size, 128))), "PNG"), None),
    "key_colour.png": (stored(CUT_OUT, "PNG", transparency=(255, 255, 255)), CUT_OUT),
    "plain.bmp": (stored(SCENE, "BMP"), SCENE),
    "plain.tiff": (stored(SCENE, "TIFF", compression="tiff_lzw"), SCENE),
    "cmyk.tif": (stored(SCENE.convert("CMYK"), "TIFF"), SCENE),
    "plain.gif": (GIF, None),
    "moving.gif": (stored(SCENE, "GIF", **FRAMES), None),
    "moving.webp": (stored(SCENE, "WEBP", lossless=True, **FRAMES), SCENE),
    "moving.png": (stored(SCENE, "PNG", **FRAMES), SCENE),
    "plain.webp": (stored(SCENE, "WEBP", lossless=True), SCENE),
    "plain.ppm": (stored(SCENE, "PPM"), SCENE),
    "plain.jp2": (stored(SCENE, "JPEG2000"), SCENE),
    "plain.avif": (stored(SCENE, "AVIF", quality=100, subsampling="4:4:4"), SCENE),
    "a.jfif": (JPEG, SCENE),
    "a.jpe": (JPEG, SCENE),
    "A.JPG": (JPEG, SCENE),
    "bmp_inside.jpg": (stored(SCENE, "BMP"), SCENE),
    "png_inside.jpg": (PNG, SCENE),
    "jpeg_inside.gif": (JPEG, SCENE),
    "one_pixel.jpg": (stored(Image.new("RGB", (1, 1), "red"), "JPEG"), Image.new("RGB", (1, 1), (254, 0, 0))),
}
"""File name -> bytes, and what a person sees; None where that is the decoder's own affair."""


def huge(kind):
    """A header that promises more pixels than are read, and no pixels."""
    if kind == "JPEG":
        place = JPEG.index(b"\xff\xc0") + 5
        return JPEG[:place] + struct.pack(">HH", 20_000, 20_000) + JPEG[place + 4 :]
    header = struct.pack(">II", 20_000, 20_000) + PNG[24:29]
    return PNG[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + PNG[33:]


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def cut_blocks(gif):
    """A GIF without the second half of its data blocks, with an end."""
    place = gif.index(b",\0\0\0\0") + 11
    for _ in range(4):
        place += gif[place] + 1
    return gif[:place] + b"\0;"


FAULTY = {
    "empty.jpg": (b"", "empty"),
    "zeros.jpg": (bytes(5000), "zeros"),
    "page.jpg": (b"<html><body>404 Not Found</body></html>", "HTML"),
    "page2.png": (b"\n<!DOCTYPE html>\n<title>Sign in</title>", "HTML"),
    "pointer.jpg": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "Git LFS pointer",
    ),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "paper.jpg": (b"%PDF-1.4\n", "PDF"),
    "photo.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0", "heic"),
    "noise.jpg": (bytes(range(50, 250)), "known format"),
    "half.jpg": (NOISY[: len(NOISY) // 2], "Premature end"),
    "half_ended.jpg": (NOISY[: len(NOISY) // 2] + b"\xff\xd9", "premature end"),
    "half_progressive.jpg": (stored(NOISE, "JPEG", progressive=True)[:-700] + b"\xff\xd9", "JPEG: "),
    "half_cmyk.jpg": (stored(NOISE.convert("CMYK"), "JPEG")[:-900] + b"\xff\xd9", "premature end"),
    "half_cmyk_420.jpg": (stored(NOISE.convert("CMYK"), "JPEG", subsampling=2)[:-900] + b"\xff\xd9", "premature end"),
    "no_end.jpg": (JPEG[:-2], "Premature end"),
    "hole.jpg": (NOISY[:2000] + b"\xff\xd5" + NOISY[2000:], "JPEG: "),
    "half.png": (PNG[: len(PNG) // 2], "end is missing"),
    "no_end.png": (PNG[:-12], "end is missing"),
    "flipped.png": (flipped(PNG, PNG.index(b"IDAT") + 500), "checksum"),
    "flipped_header.png": (flipped(PNG, 25), "checksum"),
    "half.webp": (stored(SCENE, "WEBP")[:400], ""),
    "half.gif": (GIF[: len(GIF) // 2], ""),
    "half_ended.gif": (cut_blocks(GIF), ""),
    "half.bmp": (stored(SCENE, "BMP")[:4000], ""),
    "half.tif": (stored(SCENE, "TIFF")[:4000], ""),
    "half_lzw.tif": (stored(SCENE, "TIFF", compression="tiff_lzw")[:4000], ""),
    "half.jp2": (stored(SCENE, "JPEG2000")[:3000], ""),
    "half.avif": (stored(SCENE, "AVIF")[:400], ""),
    "half.ppm": (stored(SCENE, "PPM")[:4000], ""),
    "no_number.tif": (stored(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "no number"),
    "huge.jpg": (huge("JPEG"), f"{MAX_PIXELS:,}"),
    "huge.png": (huge("PNG"), f"{MAX_PIXELS:,}"),
}
"""File name -> bytes, and a word of the reason."""


def dataset(root, files):
    for name, (data, _) in files.items():
        write(root / "images" / name, data)
    rows = "".join(f"images/{name},{name},train\n" for name in files)
    write(root / "m.csv", f"path,identity,split\n{rows}")
    return str(root / "m.csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of the files, shards, build report)"""
    root = tmp_path_factory.mktemp("whole")
    report = build("manifest", [dataset(root, WHOLE)], str(root / "shards"), processes=1)
    return root / "images", str(root / "shards"), report


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """(folder of the files, manifest, shards that hold them, as one that looks at no image would write them)"""
    root = tmp_path_factory.mktemp("faulty")
    manifest, patch = dataset(root, FAULTY), pytest.MonkeyPatch()
    patch.setattr(writer, "read_picture", lambda data: read_picture(JPEG))
    build("manifest", [manifest], str(root / "shards"), processes=1)
    patch.undo()
    return root / "images", manifest, str(root / "shards")


@pytest.mark.parametrize("name", WHOLE)
def test_a_picture_is_what_a_person_sees(name):
    data, seen = WHOLE[name]
    pixels = read_picture(data).pixels
    lossless = not name.endswith((".jpg", ".JPG", ".jfif", ".jpe", ".avif")) and data[:2] != b"\xff\xd8"
    if seen is not None:
        difference = np.abs(pixels.astype(int) - np.asarray(seen.convert("RGB")))
        assert difference.max() <= (1 if lossless else 40)
        assert difference.mean() <= (0.5 if lossless else 4)


def test_half_transparent_pixels_are_mixed_with_white():
    pixels = read_picture(WHOLE["half_seen.png"][0]).pixels
    expected = np.asarray(SCENE) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels - expected).max() <= 1


def test_healthy_jpegs_have_the_pixels_of_torchvision_bit_for_bit():
    for size in ((64, 48), (33, 17), (1, 1), (7, 300)):
        image = NOISE.resize(size, Image.BICUBIC)
        for mode in ("RGB", "L", "CMYK"):
            for settings in ({"subsampling": n, "progressive": p} for n in (0, 1, 2) for p in (False, True)):
                data = torch.frombuffer(bytearray(stored(image.convert(mode), "JPEG", **settings)), dtype=torch.uint8)
                assert torch.equal(decode(data.numpy()), decode_jpeg(data, ImageReadMode.RGB)), (size, mode, settings)


def test_build_verify_extraction_and_loaders_take_the_same_whole_files(whole):
    folder, shards, report = whole
    assert report.images_written == len(WHOLE)
    checked = verify(shards, decode_all=True, processes=1)
    assert (checked.problems, checked.decoded) == ([], len(WHOLE))
    listing = list_images(str(folder))
    assert (sorted(listing.images), listing.left_out) == (sorted(WHOLE), [])
    alone = np.empty((len(WHOLE), 3, *SIZE), np.uint8)
    FolderImages(str(folder), listing.images, SIZE).read_into(alone, 0, len(WHOLE))
    index = ShardIndex.open(shards)
    packed = np.empty_like(alone)
    TarImages(index, "train", SIZE).read_into(packed, 0, len(WHOLE))
    rows = {identity: row for row, identity in enumerate(index.split("train").identity)}
    source = ShardSource(shards)
    for place, name in enumerate(listing.images):
        row, expected = rows[name], np.empty((3, *SIZE), np.uint8)
        resize_into(expected, decode(np.frombuffer(WHOLE[name][0], np.uint8)), "bilinear")
        assert np.array_equal(alone[place], expected), name
        assert np.array_equal(packed[row], expected), name
        assert np.array_equal(np.asarray(_read(source, row_facts(index, row))), read_picture(WHOLE[name][0]).pixels)


def row_facts(index, row):
    split = index.split("train")
    facts = {"shard": split.shard_names[split.shard[row]], "key": split.key(row)}
    return facts | {"offset": int(split.offsets[row]), "size": int(split.sizes[row])}


def test_resized_files_are_the_same_pictures(tmp_path):
    build("manifest", [dataset(tmp_path, WHOLE)], str(tmp_path / "shards"), processes=1, resize=SIZE, quality=100)
    index = ShardIndex.open(str(tmp_path / "shards"))
    source = ShardSource(str(tmp_path / "shards"))
    for row, name in enumerate(index.split("train").identity):
        small = Image.fromarray(read_picture(WHOLE[name][0]).pixels).resize(SIZE[::-1], Image.BICUBIC)
        expected = read_picture(stored(small, "JPEG", quality=100)).pixels
        assert np.array_equal(np.asarray(_read(source, row_facts(index, row))), expected), name


def test_what_is_changed_in_pictures_is_counted(whole):
    _, shards, report = whole
    again = build("manifest", [f"{shards}/../m.csv"], shards, processes=1)
    assert again.images_written == 0 and again.notes == report.notes
    counts = {
        line.split(" images ")[1].split(":")[0]: int(line.split()[0]) for line in report.notes if " images " in line
    }
    assert counts == {
        "turned upright (EXIF orientation)": 10,
        "scaled to 8 bits a channel": 9,
        "transparent, composed on white": 7,
        "converted to RGB from other colours (CMYK, LAB, ...)": 3,
        "with several pictures in a file, the first taken": 3,
        "stored as PNG, without loss": sum(
            data[:2] != b"\xff\xd8" and data[:4] not in (b"\x89PNG", b"RIFF") for data, _ in WHOLE.values()
        ),
    }


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_file_is_refused_with_a_reason(name, faulty):
    folder, _, _ = faulty
    data, reason = FAULTY[name]
    with pytest.raises(BadPicture) as error:
        read_picture(data)
    assert reason in str(error.value) and "\n" not in str(error.value) and "object at" not in str(error.value)
    with pytest.raises(DataError, match=name):
        FolderImages(str(folder), [name], SIZE).read_into(np.empty((1, 3, *SIZE), np.uint8), 0, 1)


def test_build_verify_and_loaders_refuse_the_same_faulty_files(faulty, tmp_path):
    _, manifest, shards = faulty
    with pytest.raises(DataError, match=f"^{len(FAULTY)} images cannot be read"):
        build("manifest", [manifest], str(tmp_path / "out"), processes=1)
    index = ShardIndex.open(shards)
    keys = {index.split("train").key(row) for row in range(len(FAULTY))}
    problems = verify(shards, decode_all=True, processes=1).problems
    assert {problem.key for problem in problems} == keys
    assert all("cannot be decoded" in problem.what for problem in problems)
    images = TarImages(index, "train", SIZE)
    for start, stop in pairwise(range(len(FAULTY) + 1)):
        with pytest.raises(DataError, match=f"shard train-000000.tar, key {index.split('train').key(start)}: can't be"):
            images.read_into(np.empty((1, 3, *SIZE), np.uint8), start, stop)


def test_no_warning_of_a_decoder_reaches_the_terminal(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data, _ in WHOLE.values():
            read_picture(data)
        for data, _ in FAULTY.values():
            with pytest.raises(BadPicture):
                read_picture(data)
    assert capfd.readouterr() == ("", "")


def test_every_ending_is_read_by_its_content_whatever_it_says(tmp_path):
    for ending in IMAGE_ENDINGS:
        write(tmp_path / f"a{ending}", PNG)
    write(tmp_path / "notes.txt", "x")
    write(tmp_path / ".hidden.jpg", JPEG)
    write(tmp_path / "photo.heic", JPEG)
    write(tmp_path / "7f3a", PNG)
    for litter in (".DS_Store", "Thumbs.db", "._a.jpg", "__MACOSX/a.jpg"):
        write(tmp_path / litter, "x")
    listing = list_images(str(tmp_path))
    assert len(listing.images) == len(IMAGE_ENDINGS) + 2 > 20 and "photo.heic" in listing.images
    assert listing.left_out == [".hidden.jpg", "notes.txt"]
