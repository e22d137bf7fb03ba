"""Descriptors of a packed split, or of a plain folder of images, into features.npz or a folder of Parquet files.

    python launch/extract.py --weights runs/demo --split query --out query.npz

Under torchrun the processes share the images; the features are the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import (
    Parser,
    add_settings,
    add_weights,
    check_out,
    end,
    load_settings,
    local_place,
    owned_result,
    place,
    progress_bar,
    run,
)

USAGE = """
  extract.py [--config FILE] --weights FILE|RUN (--split NAME | --images DIR)
             --out FILE.npz|FOLDER.parquet [key.path=value ...]"""

EXAMPLE = """examples:
  python launch/extract.py --weights runs/demo --split gallery --out gallery.npz
  python launch/extract.py --weights runs/veri --images photos --out photos.npz
  python launch/extract.py --config configs/market1501_vit.yaml --weights ViT-B-16_60.pth --split query --out q.npz
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 launch/extract.py --weights runs/demo --split gallery \\
      --out gallery.parquet eval.flip=true

The file holds `features` float32 [n, D] of length 1 (eval.descriptor, eval.flip), `identities`, `keys`, `splits`,
`lists`, `times` (strings, empty is unknown), `cameras`, `views` (integers, -1 is unknown), in the order of the index,
or of the names in the folder. A name that ends in .parquet is a folder of Parquet files with the same columns, for
large sets.
Images of a folder are described without side information, as no camera or view of theirs is known.
Under torchrun the processes share the images, and the features are the same bit by bit; cluster.workers does not
count."""


def main(arguments: list[str]) -> None:
    options = (parser := make_parser()).parse_intermixed_args(arguments)
    _check_out(parser, options.out)

    from cluster.checks.before_run import check_split
    from cluster.evaluation.feature_file import write_features
    from cluster.evaluation.find_weights import open_weights
    from cluster.evaluation.trained import FEATURES
    from shards.images.listing import Listing, describe_left_out, list_images

    with owned_result(options.out, "extracting"), open_weights(options.weights) as weights:
        config = load_settings(options, weights.trained)
        index = None if options.split is None else check_split(config, options.split)
        listing = list_images(options.images) if index is None else Listing([], [])
        weights.check(config, index, FEATURES)
        from cluster.evaluation.inference import Inference
        from cluster.ranks.process import this_team

        with this_team(config.cluster) as team:
            inference = Inference(config, weights.path, weights.card, index, team)
            if index is not None:
                arrays = inference.extract_split(index, options.split, progress_bar)
            else:
                arrays = inference.extract_images(options.images, listing.images, progress_bar)
            if team.is_first:
                write_features(options.out.absolute(), arrays)
                count, width = arrays["features"].shape
                print(f"{options.out}: {count:,} images x {width:,} values")
                if listing.left_out:
                    print(f"{options.images}: {describe_left_out(listing.left_out)}")


def _check_out(parser: Parser, out: Path) -> None:
    """Feature files are replaced, folders of parts are not."""
    if out.suffix == ".parquet" and out.exists():
        parser.error(f"--out {out}: is there already; remove it, or choose another name")
    check_out(parser, out)


def make_parser() -> Parser:
    parser = Parser(prog="extract.py", usage=USAGE, description=__doc__.split("\n")[0], epilog=EXAMPLE)
    add_settings(parser, required=False)
    add_weights(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--split", metavar="NAME", help="split of data.shards: train, query, gallery, test")
    what.add_argument(
        "--images", type=place, metavar="DIR", help="folder, zip or URL with images, also in folders below it"
    )
    parser.add_argument(
        "--out", required=True, type=local_place, metavar="FILE", help="file to write, or NAME.parquet: folder of parts"
    )
    return parser


if __name__ == "__main__":
    end(run(main))
