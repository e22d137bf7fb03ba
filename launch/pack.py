"""Raw dataset to tar shards and index; checks and shows what was packed.

    python launch/pack.py build --dataset veri776 --root data/VeRi --out data/veri776-shards

Also draws a demo dataset to pack.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, check_out, end, local_place, not_negative, place, positive, progress_bar, run

EXAMPLE = """examples:
  python launch/pack.py render --out data/demo
  python launch/pack.py build --dataset folders --root photos --noun person --out data/mine --dry-run
  python launch/pack.py build --dataset mot --root MOT17/train --frame-step 10 --out data/mot17
  python launch/pack.py build --dataset veri776 --root data/demo --name demo --out data/demo-shards
  python launch/pack.py build --dataset market1501+msmt17 --root data/market --root data/msmt17 --out s3://bucket/joint
  python launch/pack.py build --dataset manifest --root images.csv --noun animal --out data/animals
  python launch/pack.py verify data/demo-shards --all
  python launch/pack.py inspect data/demo-shards --sheet sheet.png"""

BUILD = """Pack a dataset into shards. Every image is decoded: one that is not whole is named, and nothing is packed.
Shards keep the bytes of JPEG, PNG and WebP files; other formats are stored as PNG, without loss."""


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    return options.command(options)


def make_parser() -> Parser:
    parser = Parser(prog="pack.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    commands = parser.add_subparsers(required=True, metavar="render | build | verify | inspect")
    _add_render(commands.add_parser("render", help="draw a demo dataset of vehicles", epilog=EXAMPLE))
    _add_build(commands.add_parser("build", help="pack a dataset into shards", description=BUILD, epilog=EXAMPLE))
    _add_verify(commands.add_parser("verify", help="check shards against their index", epilog=EXAMPLE))
    _add_inspect(commands.add_parser("inspect", help="show what a packed dataset holds", epilog=EXAMPLE))
    return parser


def _add_render(parser: Parser) -> None:
    parser.add_argument("--out", type=local_place, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--identities", type=positive, default=200)
    parser.add_argument("--cameras", type=positive, default=6)
    parser.add_argument("--images", type=positive, default=20, help="images of each identity")
    parser.add_argument("--layout", choices=("veri776", "vehicleid"), default="veri776")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", action="store_true", help="say of each image what it shows, in captions.csv")
    parser.set_defaults(command=render)


def _add_build(parser: Parser) -> None:
    parser.add_argument(
        "--dataset", required=True, metavar="NAME[+NAME...]", help="layout of the root; + joins several"
    )
    parser.add_argument(
        "--root",
        required=True,
        action="append",
        type=place,
        metavar="PATH",
        help="folder, zip or URL of the dataset, once for each NAME; manifest: FILE.csv [and the image folder]",
    )
    parser.add_argument(
        "--out", required=True, type=place, metavar="URL", help="folder of the shards, local or fsspec URL"
    )
    parser.add_argument(
        "--views",
        nargs="+",
        action="extend",
        type=place,
        metavar="FILE",
        help="veri776: key-point files with the viewpoints",
    )
    parser.add_argument("--drop-unlabelled", action="store_true", help="veri776: leave out images without a view")
    parser.add_argument("--msmt17-val", choices=("merge", "leave"), help="msmt17: validation images train too (merge)")
    parser.add_argument(
        "--camera-pattern",
        metavar="REGEX",
        help="folders: finds the camera in a path below its identity's folder, as 'c(\\d+)'; or the word guess",
    )
    parser.add_argument(
        "--test-share", type=share, metavar="S", help="folders, mot: part of the identities to test with (default 0.3)"
    )
    parser.add_argument("--seed", type=not_negative, metavar="N", help="folders, mot: of that division (default 0)")
    parser.add_argument("--tracks", type=place, metavar="DIR", help="mot: a tracker's SEQUENCE.txt, not gt/gt.txt")
    parser.add_argument(
        "--frame-step", type=positive, metavar="N", help="mot: every N-th frame of a track (default 10)"
    )
    parser.add_argument("--shared-tracks", action="store_true", help="mot: all sequences number their tracks alike")
    parser.add_argument("--boxes", choices=("detected", "labelled"), help="cuhk03: which boxes (default detected)")
    parser.add_argument("--noun", metavar="WORD", help="what the images show, for the prompt: person, vehicle, ...")
    parser.add_argument(
        "--name", metavar="NAME", help="of the dataset, in all logs; default: the root's folder, or the layout's name"
    )
    parser.add_argument(
        "--captions", type=place, metavar="FILE.csv", help="table with the columns path and caption, a row each image"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be packed, and write nothing")
    parser.add_argument("--processes", type=positive, metavar="N", help="default: the cores at hand")
    parser.add_argument("--shard-mb", type=positive, default=256, metavar="MB", help="size of a shard (default 256)")
    parser.add_argument("--resize", type=height_by_width, metavar="HxW", help="store resized JPEGs, not the originals")
    parser.add_argument("--quality", type=jpeg_quality, metavar="Q", help="JPEG quality of --resize (default 95)")
    parser.add_argument("--strict", action="store_true", help="refuse to pack what would give warnings")
    parser.set_defaults(command=build)


def _add_verify(parser: Parser) -> None:
    parser.add_argument("url", type=place, metavar="URL", help="folder of a packed dataset")
    parser.add_argument("--all", action="store_true", help="decode every image, not a sample")
    parser.add_argument("--processes", type=positive, metavar="N", help="default: the cores at hand")
    parser.set_defaults(command=verify)


def _add_inspect(parser: Parser) -> None:
    parser.add_argument("url", type=place, metavar="URL", help="folder of a packed dataset")
    parser.add_argument(
        "--sheet", type=local_place, metavar="FILE.png", help="write a sheet of images, one identity a row"
    )
    parser.set_defaults(command=inspect, parser=parser)


def jpeg_quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JPEG quality 1 to 100")
    return int(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1, for example 0.3")
    return value


def height_by_width(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 256x128")
    return positive(height), positive(width)


def render(options: argparse.Namespace) -> int:
    from shards.demo.dataset import render_dataset

    with progress_bar("rendering") as progress:
        render_dataset(
            options.out,
            identities=options.identities,
            cameras=options.cameras,
            images=options.images,
            layout=options.layout,
            seed=options.seed,
            captions=options.captions,
            progress=progress,
        )
    return 0


PARSER_OPTIONS = (
    *("views", "drop_unlabelled", "msmt17_val", "camera_pattern", "test_share", "seed"),
    *("tracks", "frame_step", "shared_tracks", "boxes"),
)
"""Options that are fields of the parsers."""


def build(options: argparse.Namespace) -> int:
    from shards.packing.build import build
    from shards.packing.tables import print_build, print_plan

    given = {name: getattr(options, name) for name in PARSER_OPTIONS}
    parser_options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None and value is not False
    }
    if options.dry_run:
        from shards.datasets.joint import read_collection
        from shards.packing.validate import check_collection

        collection = read_collection(options.dataset, options.root, parser_options, options.noun, options.name)
        print_plan(collection, check_collection(collection))
        return 0
    with progress_bar("packing") as progress:
        report = build(
            options.dataset,
            options.root,
            options.out,
            options=parser_options,
            noun=options.noun,
            name=options.name,
            processes=options.processes,
            shard_mb=options.shard_mb,
            resize=options.resize,
            quality=options.quality,
            captions=options.captions,
            strict=options.strict,
            progress=progress,
        )
    print_build(report, options.out)
    return 0


def verify(options: argparse.Namespace) -> int:
    from shards.packing.tables import print_verify
    from shards.packing.verify import verify

    with progress_bar("verifying") as progress:
        report = verify(options.url, decode_all=options.all, processes=options.processes, progress=progress)
    print_verify(report, options.url)
    return 1 if report.problems else 0


def inspect(options: argparse.Namespace) -> int:
    from shards.packing.overview import Overview
    from shards.packing.tables import print_overview

    if options.sheet:
        check_out(options.parser, options.sheet, "--sheet")
    print_overview(Overview.read(options.url))
    if options.sheet:
        from shards.packing.contact_sheet import write_sheet

        write_sheet(options.url, options.sheet)
        print(f"contact sheet: {options.sheet}")
    return 0


if __name__ == "__main__":
    end(run(main))
