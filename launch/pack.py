"""Raw dataset to tar shards and index; checks and shows what was packed.

    python launch/pack.py build --dataset veri776 --root data/VeRi --out data/veri776-shards

Also draws a demo dataset to pack.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, check_out, end, local_place, place, positive, progress_bar, run

EXAMPLE = """examples:
  python launch/pack.py render --out data/demo
  python launch/pack.py build --dataset veri776 --root data/demo --out data/demo-shards
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
    parser.add_argument("--noun", metavar="WORD", help="what the images show, for the prompt: person, vehicle, ...")
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
            progress=progress,
        )
    return 0


def build(options: argparse.Namespace) -> int:
    from shards.packing.build import build
    from shards.packing.tables import print_build

    parser_options: dict[str, Any] = {}
    if options.views:
        parser_options["views"] = tuple(options.views)
    if options.drop_unlabelled:
        parser_options["drop_unlabelled"] = True
    if options.msmt17_val:
        parser_options["msmt17_val"] = options.msmt17_val
    with progress_bar("packing") as progress:
        report = build(
            options.dataset,
            options.root,
            options.out,
            options=parser_options,
            noun=options.noun,
            processes=options.processes,
            shard_mb=options.shard_mb,
            resize=options.resize,
            quality=options.quality,
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
