"""Small folders in the layouts of the datasets, with the strays that real ones hold, for tests of the pack side."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

VIEWS_LINE = " ".join(str(n) for n in range(40))


@cache
def image_bytes(seed: int = 0, width: int = 12, height: int = 20, kind: str = "JPEG") -> bytes:
    """A noise image; 200 x 200 pixels are about 40 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_images(folder: Path, names: list[str], **size) -> None:
    for seed, name in enumerate(names):
        write(folder / name, image_bytes(seed, **size))


def add_strays(folder: Path) -> None:
    """What file managers and archivers leave behind; none of it is an image of the dataset."""
    write(folder / "Thumbs.db", b"stray")
    write(folder / ".DS_Store", b"stray")
    write(folder / "._0001_c1s1_000001_01.jpg", b"stray")
    write(folder / "__MACOSX" / "._0001_c1s1_000001_01.jpg", b"stray")
    write(folder / "__MACOSX" / "0001_c1s1_000001_01.jpg", b"stray")
    write(folder / "readme.txt", b"stray")


PERSON_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")


def make_market(root: Path) -> Path:
    names = (
        ["0002_c1s1_000451_03.jpg", "0002_c2s1_000451_01.jpg", "0007_c3s3_077419_03.jpg", "0007_c6s3_077419_03.jpg"],
        ["0001_c1s1_001051_00.jpg", "0003_c3s1_001051_00.jpg"],
        ["0001_c2s1_000976_01.jpg", "0003_c1s6_015971_02.jpg", "0000_c1s1_000151_01.jpg", "-1_c1s1_000401_03.jpg"],
    )
    for folder, images in zip(PERSON_FOLDERS, names, strict=True):
        write_images(root / folder, images)
        add_strays(root / folder)
    return root


def make_duke(root: Path) -> Path:
    names = (
        ["0001_c2_f0046182.jpg", "0001_c8_f0046302.jpg", "0020_c1_f0001105.jpg", "0020_c2_f0001106.jpg"],
        ["0005_c2_f0046985.jpg"],
        ["0005_c5_f0051341.jpg", "7140_c3_f0051349.jpg"],
    )
    for folder, images in zip(PERSON_FOLDERS, names, strict=True):
        write_images(root / folder, images)
        add_strays(root / folder)
    return root


def make_msmt17(root: Path, folders: tuple[str, str] = ("train", "test"), suffix: str = "") -> Path:
    lists = {
        "train": (folders[0], [("0000/0000_000_01_0303morning_0015_0", 0), ("0001/0001_000_15_0113noon_0022_1", 1)]),
        "val": (folders[0], [("0000/0000_001_02_0303morning_0016_0", 0), ("0001/0001_001_03_0113noon_0022_2", 1)]),
        "query": (folders[1], [("0000/0000_000_01_0302afternoon_0015_0", 0)]),
        "gallery": (folders[1], [("0000/0000_001_04_0302afternoon_0016_0", 0)]),
    }
    for name, (folder, images) in lists.items():
        write_images(root / folder, [f"{path}{suffix}.jpg" for path, _ in images])
        write(root / f"list_{name}.txt", "".join(f"{path}{suffix}.jpg {label}\n" for path, label in images))
    for folder in folders:
        add_strays(root / folder)
        add_strays(root / folder / "0000")
        write(root / folder / "0000" / "0000_099_01_0303morning_0015_0.jpg", image_bytes(9))  # in no list
    return root


VERI_NAMES = {
    "train": ["0001_c001_00016450_0.jpg", "0001_c020_00016460_0.jpg", "0005_c003_00084375_1.jpg", "0005_c004_1_0.jpg"],
    "query": ["0002_c002_00030600_0.jpg"],
    "test": ["0002_c002_00030600_0.jpg", "0002_c003_00030605_0.jpg"],
}


def make_veri(root: Path) -> Path:
    for folder, names in VERI_NAMES.items():
        write_images(root / f"image_{folder}", names)
        add_strays(root / f"image_{folder}")
        write(root / f"name_{folder}.txt", "".join(f"{name}\n" for name in names))
    item = '<Item imageName="{}" vehicleID="{}" cameraID="{}" colorID="{}" typeID="4" />'
    items = "\n".join(item.format(name, *name.split("_")[:2], n) for n, name in enumerate(VERI_NAMES["train"], 1))
    head = '<?xml version="1.0" encoding="gb2312"?>\n<TrainingImages Version="1.0">\n<!-- 车 -->\n'
    xml = f'{head}<Items number="4">\n{items}'
    write(root / "train_label.xml", xml.encode("gb2312"))
    write(
        root / "keypoint_train.txt",
        "".join(f"/home/u/VeRi/image_train/{n} {VIEWS_LINE} 3\n" for n in VERI_NAMES["train"]),
    )
    twice = f"../image_test/{VERI_NAMES['test'][0]} {VIEWS_LINE} 7\n"
    write(root / "keypoint_test.txt", twice + twice)
    return root


def make_vehicleid(root: Path) -> Path:
    lists = {
        "train_list": [(1, 10), (2, 10), (3, 9), (4, 9)],
        "test_list_800": [(11, 20), (12, 20)],
        "test_list_1600": [(12, 20), (11, 20), (13, 21), (14, 21)],
        "test_list_2400": [(11, 20), (12, 20), (13, 21), (14, 21), (15, 22), (16, 22)],
    }
    for name, images in lists.items():
        write(root / "train_test_split" / f"{name}.txt", "".join(f"{n:07d} {i}\n" for n, i in images))
    numbers = sorted({n for images in lists.values() for n, _ in images})
    write_images(root / "image", [f"{n:07d}.jpg" for n in numbers])
    write(root / "attribute" / "color_attr.txt", "10 3\n9 0\n")
    write(root / "attribute" / "model_attr.txt", "10 41\n")
    add_strays(root / "image")
    add_strays(root / "train_test_split")
    return root


def make_manifest(
    root: Path,
    train: int = 4,
    tested: int = 2,
    images: int = 4,
    size: dict[str, int] | None = None,
    camera_of=lambda number: number % 2,
) -> Path:
    """A CSV with `train` training identities of `images` images each, and `tested` others with one query each."""
    rows = ["path,identity,split,camera"]
    for identity in range(train + tested):
        for number in range(images):
            split = "train" if identity < train else "query" if number == 0 else "gallery"
            path = f"crops/{identity:04d}/{number:02d}.jpg"
            write(root / path, image_bytes(1000 * identity + number, **(size or {})))
            rows.append(f"{path},id {identity:04d},{split},{camera_of(number)}")
    write(root / "images.csv", "\n".join(rows) + "\n")
    return root / "images.csv"


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def folders_of_identities(images: Path, root: Path) -> Path:
    """Rendered images, whose names begin with four digits of identity, as a user has them: ROOT/IDENTITY/name."""
    for path in sorted(images.glob("image_*/*.jpg")):
        write(root / path.name[:4] / path.name, path.read_bytes())
    return root
