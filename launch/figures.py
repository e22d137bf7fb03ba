"""Pictures of what a model learned: t-SNE, relevance maps and ranked lists, as PNG files.

    python launch/figures.py --weights runs/demo --out pictures

They are figures 1, 3 and 4 of the paper, for the dataset and weights at hand.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import (
    Parser,
    add_settings,
    add_weights,
    end,
    load_settings,
    local_place,
    owned_result,
    progress_bar,
    run,
)

USAGE = """
  figures.py [--config FILE] --weights FILE|RUN --out DIR [--figure NAME ...] [key.path=value ...]"""
NAMES = ("tsne", "relevance", "ranked")

EXAMPLE = """figures, as in the paper:
  tsne        Figure 1: image and text features of ten training identities; (a) is that of a run with stages=[1],
              (b) that of a run with both stages
  relevance   Figure 3: relevance of a training image's regions for its identity
  ranked      Figure 4: queries and their ten nearest gallery images, right ones green, wrong ones red

examples:
  python launch/figures.py --weights runs/demo --out pictures
  python launch/figures.py --weights runs/prompts --out stage1 --figure tsne
  python launch/figures.py --config configs/msmt17_vit.yaml --weights ViT-B-16_60.pth --out msmt17 --figure ranked"""


def main(arguments: list[str]) -> None:
    options = (parser := make_parser()).parse_intermixed_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is a file; name a folder")

    from cluster.checks.before_run import check_evaluation, check_split
    from cluster.evaluation.find_weights import open_weights
    from cluster.evaluation.trained import FEATURES

    with owned_result(options.out, "drawing"), open_weights(options.weights) as weights:
        config = load_settings(options, weights.trained)
        index = check_evaluation(config) if "ranked" in options.figure else check_split(config, "train")
        weights.check(config, index, FEATURES)
        from cluster.evaluation.figures import Subject, draw_figure

        subject = Subject.of(config, weights.path, weights.card, index, progress_bar)
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.figure:
            draw_figure(name, subject, options.out / f"{name}.png")
            print(options.out / f"{name}.png")


def make_parser() -> Parser:
    parser = Parser(prog="figures.py", usage=USAGE, description=__doc__.split("\n")[0], epilog=EXAMPLE)
    add_settings(parser, required=False)
    add_weights(parser)
    parser.add_argument("--out", required=True, type=local_place, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--figure", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="default: all")
    return parser


if __name__ == "__main__":
    end(run(main))
