"""Evaluate weights on a packed dataset, or features of any model: mAP and CMC as JSON.

    python launch/evaluate.py --weights runs/demo

Under torchrun the processes share the work; the metrics are the same.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipreid.retrieval.rules import RULES, Rule
from launch.cli import (
    Parser,
    add_settings,
    add_weights,
    check_out,
    end,
    load_settings,
    local_place,
    not_negative,
    owned_result,
    place,
    positive,
    progress_bar,
    run,
    share,
)
from shards.errors import masked

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """
  evaluate.py [--config FILE] --weights FILE|RUN [key.path=value ...] [--out FILE.json]
              [--per-query FILE.csv [--top-k K]] [--open-set [--fpir RATE] [--keep]]
  evaluate.py --features FILE.npz [FILE.npz] [--normalize|--no-normalize] [--rule camera|none|camera_time]
              [--rerank K1,K2,LAMBDA] [--protocol vehicleid --draws 10 --seed 0] [--out FILE.json]
              [--per-query FILE.csv [--top-k K]] [--open-set [--fpir RATE]]"""

EXAMPLE = """examples:
  python launch/evaluate.py --weights runs/demo eval.rerank=20,6,0.3
  python launch/evaluate.py --config configs/market1501_vit.yaml --weights ViT-B-16_60.pth data.shards=data/market
  python launch/evaluate.py --features query.npz gallery.npz --rerank 20,6,0.3 --out reranked.json
  python launch/evaluate.py --features query.npz gallery.npz --per-query queries.csv --top-k 10
  python launch/evaluate.py --features test.npz --protocol vehicleid --draws 10
  python launch/evaluate.py --weights runs/demo --open-set --fpir 0.01 --keep

With --features, one file holds query_features [n, D], query_identities, query_cameras, and gallery_* likewise; or two
files, or folders NAME.parquet, written by extract.py, the query's first; or for vehicleid one extraction of split test.
With --weights the rule, re-ranking and draws are those of the configuration (eval.rule, eval.rerank, eval.draws,
run.seed). Under torchrun the processes share the work, and the metrics are the same; cluster.workers does not count.

The result holds fractions: mAP, mINP and R1, R5, R10 over the valid queries, which have a match; and TPR@FPR, the share
of pairs (query, gallery image) of one identity that one distance for all accepts, where it accepts at most 1e-4, 1e-3
and 1e-2 of the pairs of different identities (fast-reid's figure of that name has the classes the other way round). An
empty identity, or -1, is unknown: it equals none.

--open-set takes half of the identities, drawn by the seed, out of the gallery and searches for all. FPIR: share of the
searches for those that find an image nearer than the threshold; FNIR: share of the others whose nearest image is
another's or not nearer than the threshold (ISO/IEC 19795-1, with lists of one). It gives FNIR at FPIR 0.1 and 0.01 in
growing galleries, the threshold that keeps to --fpir with its interval, and the probability that two images are of one
identity; docs/comparing.md explains them. --keep puts threshold and probability into the card of the weights."""

WANTED_FPIR = 0.01
FEATURE_OPTIONS = ("normalize", "rule", "rerank", "protocol", "draws", "seed")


def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    if not options.weights and not options.features:
        parser.error("give --weights, or --features")
    for name in ("fpir", "keep") if not options.open_set else ():
        if getattr(options, name):
            parser.error(f"--{name}: belongs to --open-set, which is not given")
    place = _check_places(parser, options)
    with owned_result(place, "evaluating"):
        metrics = _from_features(parser, options) if options.features else _from_weights(parser, options)
        if metrics is None:
            return

        from cluster.evaluation.result_file import write_result

        # First: they are not lost where the file cannot be written.
        show(metrics, Path((options.features or [options.weights])[0]).stem)
        print(masked(f"metrics: {write_result(metrics, place, replace=options.out is not None)}"))


def _check_places(parser: Parser, options: argparse.Namespace) -> str:
    """Where the result is to go. Refuses a place that is taken or cannot be written, before the work is done."""
    from cluster.evaluation.result_file import default_place, is_of_a_run
    from shards.storage import local_path

    evaluated = options.features or [options.weights]
    place = str(options.out or default_place(evaluated[0]))
    out = local_path(place)
    if options.out:
        check_out(parser, options.out)
        if is_of_a_run(options.out):
            parser.error(f"--out {options.out}: is the {options.out.name} of a run; choose another name")
        if options.out.resolve() in [Path(name).resolve() for name in evaluated]:
            parser.error(f"--out {options.out}: is what is evaluated; choose another name")
    elif out and out.absolute().parent.is_dir():
        check_out(parser, out, "--out: not given, and")
    if options.per_query:
        check_out(parser, options.per_query, "--per-query")
        if out and options.per_query.resolve() == out.resolve():
            parser.error(f"--per-query {options.per_query}: is the file of --out too; name another")
    elif options.top_k:
        parser.error("--top-k: the lists are written into --per-query FILE.csv, which is not given")
    return place


def make_parser() -> Parser:
    parser = Parser(prog="evaluate.py", usage=USAGE, description=__doc__.split("\n")[0], epilog=EXAMPLE)
    add_settings(parser, required=False)
    add_weights(parser, required=False)
    parser.add_argument("--features", nargs="+", type=place, metavar="FILE.npz", help="features in place of weights")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale features to length 1 first (default), or compare them by their plain Euclidean distance",
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="gallery images of the query's identity that do not count: same camera (default), none, or same camera "
        "and time",
    )
    parser.add_argument("--rerank", type=rerank_settings, metavar="K1,K2,LAMBDA", help="re-ranked figures as well")
    parser.add_argument("--protocol", choices=("vehicleid",), help="draw queries and gallery from the test lists")
    parser.add_argument("--draws", type=positive, metavar="N", help="random galleries of vehicleid (default 10)")
    parser.add_argument("--seed", type=not_negative, metavar="N", help="fixes the draws (default 0)")
    parser.add_argument(
        "--per-query",
        type=local_place,
        metavar="FILE.csv",
        help="also a table of each query's matches, first rank and AP",
    )
    parser.add_argument("--top-k", type=positive, metavar="K", help="and its K nearest gallery images, in that table")
    parser.add_argument("--open-set", action="store_true", help="also searches for who is not in the gallery")
    parser.add_argument("--fpir", type=share, metavar="RATE", help="that the threshold is to keep to (default 0.01)")
    parser.add_argument("--keep", action="store_true", help="threshold and probability go into the weights' card")
    parser.add_argument(
        "--out",
        type=local_place,
        metavar="FILE",
        help="result; default: RUN/evaluation.json, or NAME.metrics.json beside the weights or features NAME, with a "
        "number behind it where other figures are there already",
    )
    return parser


def rerank_settings(text: str) -> tuple[int, int, float]:
    try:
        k1, k2, weight = text.split(",")
        settings = int(k1), int(k2), float(weight)
    except ValueError:
        settings = 0, 0, 0.0
    if min(settings[:2]) < 1 or not 0 <= settings[2] <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not K1,K2,LAMBDA such as 20,6,0.3 (LAMBDA from 0 to 1)")
    return settings


def _from_weights(parser: Parser, options: argparse.Namespace) -> dict[str, Any] | None:
    """None in all processes of torchrun but the first."""
    for name in FEATURE_OPTIONS:
        if getattr(options, name) is not None:
            parser.error(f"--{name} belongs to --features; with --weights set eval.* or run.seed as key.path=value")

    from cluster.checks.before_run import check_evaluation
    from cluster.evaluation.find_weights import open_weights
    from cluster.evaluation.trained import METRICS

    with open_weights(options.weights) as weights:
        config = load_settings(options, weights.trained)
        index = check_evaluation(config)
        if options.per_query and "test" in index.splits:
            parser.error(f"--per-query: {index.name} is evaluated over draws, each with queries of its own")
        if options.keep and weights.card is None:
            parser.error(f"--keep: {options.weights} was not written by this system and has no card")
        weights.check(config, index, METRICS)
        from cluster.evaluation.inference import Inference
        from cluster.evaluation.open_set import keep_decision
        from cluster.ranks.process import this_team

        with this_team(config.cluster) as team:
            inference = Inference(config, weights.path, weights.card, index, team)
            asked = _open_set(options, config.run.seed)
            metrics = inference.evaluate(index, progress_bar, _per_query_file(options), asked)
            if not team.is_first:
                return None
            if options.keep:
                print(f"card: {masked(keep_decision(options.weights, weights.path, metrics, config, index))}")
            return metrics


def _from_features(parser: Parser, options: argparse.Namespace) -> dict[str, Any] | None:
    """None in all processes of torchrun but the first."""
    _check_feature_options(parser, options)
    from cluster.evaluation.feature_file import read_pair, read_test
    from cluster.settings.config import EvalSection, RunSection

    rule: Rule = options.rule or EvalSection().rule
    normalize = options.normalize is not False
    sets = [read_test(options.features[0])] if options.protocol else read_pair(options.features, rule)
    from cluster.evaluation.metrics import DrawSettings, RetrievalSettings, metrics_of_pair, metrics_of_test
    from cluster.ranks.process import this_team

    seed = RunSection().seed if options.seed is None else options.seed
    asked = _open_set(options, seed)
    with this_team() as team:
        if options.protocol:
            draws = DrawSettings(options.draws or EvalSection().draws, seed, asked)
            metrics = metrics_of_test(*sets, normalize=normalize, draws=draws, team=team)
        else:
            settings = RetrievalSettings(rule, options.rerank, _per_query_file(options), asked)
            metrics = metrics_of_pair(*sets, normalize=normalize, settings=settings, team=team, show=progress_bar)
        return metrics if team.is_first else None


def _per_query_file(options: argparse.Namespace) -> Any:
    if not options.per_query:
        return None
    from cluster.evaluation.per_query import PerQueryFile

    return PerQueryFile(str(options.per_query), options.top_k or 0)


def _open_set(options: argparse.Namespace, seed: int) -> Any:
    if not options.open_set:
        return None
    from cluster.evaluation.open_set import OpenSetSettings

    return OpenSetSettings(options.fpir or WANTED_FPIR, seed)


def _check_feature_options(parser: Parser, options: argparse.Namespace) -> None:
    for name in ("config", "weights"):
        if getattr(options, name) is not None:
            parser.error(f"--{name} and --features exclude each other: features are evaluated without a model")
    if options.overrides:
        parser.error(f"{options.overrides[0]}: with --features there are no settings to replace")
    most = 1 if options.protocol else 2
    if len(options.features) > most:
        parser.error(f"--features: {len(options.features)} files; give {'one' if most == 1 else 'one or two'}")
    if options.keep:
        parser.error("--keep: features have no card to keep it in; give --weights")
    unfit = ("draws",) if options.open_set else ("draws", "seed")
    for name in ("rule", "rerank", "per_query") if options.protocol else unfit:
        if getattr(options, name) is not None:
            option, preposition = f"--{name.replace('_', '-')}", "with" if options.protocol else "without"
            parser.error(f"{option} does not go {preposition} --protocol vehicleid")


def show(metrics: dict[str, Any], name: str) -> None:
    """A table of percentages: one line for the plain and the re-ranked figures, or for each size of VehicleID; and one
    of the open-set figures. name: of what was evaluated."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)

    if "mAP" in metrics:
        names: tuple[str, ...] = ("mAP", "mINP", "R1", "R5", "R10", "valid_queries")
        rows = {name: metrics} | ({f"{name}, re-ranked": metrics["rerank"]} if "rerank" in metrics else {})
    else:
        names = ("mAP", "R1", "R5", "queries", "gallery")
        rows = {size: figures for size, figures in metrics.items() if size != "open_set"}
    table = Table("%", *(name.replace("_", " ") for name in names))
    for title, figures in rows.items():
        table.add_row(title, *(_cell(figures[name]) for name in names))
    console.print(table)
    if "open_set" in metrics:
        show_open_set(metrics["open_set"], console)


def show_open_set(found: dict[str, Any], console: "Console") -> None:
    """FNIR in growing galleries, and what to decide by."""
    from rich.table import Table

    table = Table("gallery: identities", "images", *(f"FNIR at FPIR {rate}, %" for rate in found["FNIR@FPIR"]))
    for row in found["by_gallery"]:
        table.add_row(f"{row['identities']:,}", f"{row['images']:,}", *map(_percent, row["FNIR@FPIR"].values()))
    console.print(table)
    threshold = found["threshold"]
    low, high = threshold["distance"]["low"], threshold["distance"]["high"]
    console.print(
        f"threshold for FPIR {threshold['wanted']:g}: distance {threshold['distance']['value']:.4f} [{low:.4f}, "
        f"{high:.4f}]; FPIR {_percent(threshold['FPIR'])} %, FNIR {_percent(threshold['FNIR'])} %",
        soft_wrap=True,
    )
    if same := found.get("same_identity"):
        console.print(
            f"probability that two images are of one identity: 1 / (1 + exp(-({same['intercept']:.3f} "
            f"{same['slope']:+.3f} x distance))), calibration error {100 * same['calibration_error']:.1f} % on other "
            f"identities; {len(same['by_camera'])} cameras have a curve of their own",
            soft_wrap=True,
        )


def _percent(estimate: dict[str, float]) -> str:
    """ "12.3 [9.0, 16.1]"."""
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _cell(value: float | int | dict[str, float]) -> str:
    if isinstance(value, dict):
        spread = f" ± {100 * value['std']:.1f}" if "std" in value else ""
        return f"{100 * value['mean']:.1f}{spread}"
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.1f}"


if __name__ == "__main__":
    end(run(main))
