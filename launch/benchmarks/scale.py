"""What a step costs as the number of identities N and of ranks R grow: seconds, bytes that a rank sends, its memory.

Real steps of stage 1 and stage 2 (losses, backward pass, DeepSpeed, Adam over all N identities) on made-up images, in
R processes of this machine with one thread each. Bytes are counted at the collectives, by rules that the result states.
With --checkpoint instead: ten steps, a checkpoint, and on from it on half as many ranks, with the memory of each rank.
"""

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.cli import Parser, local_place, place, positive
from launch.measure.timing import machine_facts
from launch.scaling.charts import scale_chart, table, write
from launch.scaling.ranks import on_ranks
from launch.scaling.resume import checkpoint_and_resume
from launch.scaling.stages import PER_IDENTITY, Case, measure
from launch.scaling.traffic import rules

EXAMPLE = """examples:
  python launch/bench.py scale --out scale
  python launch/bench.py scale --stages 1 --identities 100 13164 --ranks 1 2 --rounds 3 --arch ViT-B-16-quickgelu \\
      --image-size 256x128
  python launch/bench.py scale --stages 2 --identities 1000 --ranks 1 --arch ViT-B-16-quickgelu --image-size 256x128 \\
      --micro-batch 8 --steps 1
  python launch/bench.py scale --checkpoint --identities 1000000 --ranks 4 --dir /mnt/large"""
IDENTITIES = [1_000, 13_164, 100_000, 1_000_000]
RANKS = [1, 2, 4]
COLUMNS = {
    "stage": lambda row: row["stage"],
    "N": lambda row: f"{row['identities']:,}",
    "ranks": lambda row: row["ranks"],
    "step, ms": lambda row: row["step_ms"],
    "sent per rank and step, bytes": lambda row: f"{row['sent_bytes']:,}",
    "peak memory per rank, MB": lambda row: row["peak_memory_mb"],
}


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    head = {"bench": "scale", **machine_facts(torch.device("cpu")), **_facts(options)}
    if options.checkpoint:
        return head | {"checkpoint": _checkpoints(options)}
    rows = _rows(options)
    result = head | {"bytes_sent": rules(), "rows": rows, "over_fewest_identities": _over_fewest(rows)}
    if options.out:
        write(options.out, "scale", result, table(COLUMNS, rows), scale_chart(rows))
    return result


def add_model_options(parser: Parser) -> None:
    """Of the model whose steps are taken; `read_image_size` reads the size."""
    parser.add_argument(
        "--arch", default="configs/models/small_vit.json", help="open_clip model name or JSON file (random weights)"
    )
    parser.add_argument("--image-size", default="64x64", metavar="HxW", help="pixels (default 64x64)")
    parser.add_argument("--batch", type=positive, default=64, help="images of the global batch, a multiple of 4")
    parser.add_argument("--steps", type=positive, default=10, help="steps that are timed (default 10)")


def read_image_size(options: argparse.Namespace, parser: Parser) -> None:
    try:
        height, width = map(int, options.image_size.split("x"))
    except ValueError:
        parser.error(f"--image-size {options.image_size} is not HxW, for example 256x128")
    options.image_size = (height, width)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py scale", description=__doc__, epilog=EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--identities", nargs="+", type=positive, default=IDENTITIES, metavar="N")
    parser.add_argument("--ranks", nargs="+", type=positive, default=RANKS, metavar="R")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument(
        "--rounds", type=positive, default=1, help="each case is measured so often, in turn (default 1)"
    )
    parser.add_argument(
        "--micro-batch", type=positive, metavar="IMAGES", help="train.micro_batch of stage 2; default: all at once"
    )
    parser.add_argument("--out", type=local_place, metavar="FOLDER", help="also write scale.json, .md and .png there")
    parser.add_argument("--checkpoint", action="store_true", help="steps, a checkpoint, and on from it on R/2 ranks")
    parser.add_argument("--dir", type=place, metavar="FOLDER", help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args(arguments)
    read_image_size(options, parser)
    places = options.batch // PER_IDENTITY
    for ranks in options.ranks:
        if options.batch % PER_IDENTITY or (2 in options.stages and places % ranks):
            parser.error(f"--batch {options.batch} is no whole number of identities x {PER_IDENTITY} for {ranks} ranks")
    if min(options.identities) < options.batch:
        parser.error(f"--identities {min(options.identities)} are fewer than the {options.batch} images of a batch")
    _case(1, max(options.identities), options).spec()
    return options


def _case(stage: int, identities: int, options: argparse.Namespace) -> Case:
    return Case(stage, identities, options.batch, options.arch, options.image_size, micro_batch=options.micro_batch)


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "threads": 1,
        "arch": options.arch,
        "image_size": list(options.image_size),
        "batch": options.batch,
        "micro_batch": options.micro_batch,
        "steps": options.steps,
        "rounds": options.rounds,
    }


def _rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = list(itertools.product(options.stages, options.ranks, sorted(options.identities)))
    measured: dict[tuple[int, int, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for stage, ranks, identities in cases:
            case = _case(stage, identities, options)
            measured[stage, ranks, identities] += on_ranks(ranks, measure, case, options.steps)
    return [_row(*case, results) for case, results in measured.items()]


def _row(stage: int, ranks: int, identities: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """results: of every rank, in every round. The calmest round's median counts, the mean of what ranks send, and the
    largest memory."""
    return {
        "stage": stage,
        "identities": identities,
        "ranks": ranks,
        "step_ms": round(1e3 * min(r["step_s"] for r in results), 2),
        "fastest_step_ms": round(1e3 * min(r["fastest_step_s"] for r in results), 2),
        "sent_bytes": round(sum(r["sent_bytes"] for r in results) / len(results)),
        "sent_bytes_by_kind": {kind: round(count) for kind, count in results[0]["bytes"].items() if count},
        "peak_memory_mb": round(max(r["peak_memory_bytes"] for r in results) / 1e6),
        "tables_mb": round(results[0]["table_bytes"] / 1e6, 1),
    }


def _over_fewest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row over the one of the fewest identities at the same stage and ranks, and over the one of one rank."""
    found = []
    for row in rows:
        alike = [r for r in rows if (r["stage"], r["ranks"]) == (row["stage"], row["ranks"])]
        fewest = min(alike, key=lambda r: r["identities"])
        alone = [r for r in rows if (r["stage"], r["identities"], r["ranks"]) == (row["stage"], row["identities"], 1)]
        ratios = {
            "step": round(row["step_ms"] / fewest["step_ms"], 3),
            "sent_bytes": round(row["sent_bytes"] / fewest["sent_bytes"], 5) if fewest["sent_bytes"] else None,
            "step_over_one_rank": round(row["step_ms"] / alone[0]["step_ms"], 3) if alone else None,
        }
        found.append({key: row[key] for key in ("stage", "identities", "ranks")} | ratios)
    return found


def _checkpoints(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for stage, ranks, identities in itertools.product(options.stages, options.ranks, options.identities):
        case = _case(stage, identities, options)
        with tempfile.TemporaryDirectory(prefix="scale-bench-", dir=options.dir) as folder:
            folder = str(Path(folder).resolve())
            found.append(checkpoint_and_resume(case, options.steps, folder, (ranks, max(ranks // 2, 1))))
    return found
