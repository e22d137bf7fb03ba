"""Train, evaluate, and write a run folder. Also what `ray job submit` runs.

    python launch/train.py --config configs/demo.yaml stage2.epochs=10

Repeating a command goes on from the run's newest checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, add_settings, end, load_settings, run

EXAMPLE = """examples:
  python launch/train.py --config configs/demo.yaml
  python launch/train.py --config configs/veri776_vit.yaml data.shards=s3://bucket/veri776 cluster.workers=8
  python launch/train.py --config configs/finetune.yaml model.pretrained=runs/demo data.shards=data/mine/shards
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 launch/train.py --config configs/demo.yaml cluster.launcher=torchrun
  ray job submit --working-dir . -- python launch/train.py --config configs/demo.yaml
Repeating a command goes on from the run's newest checkpoint."""


def main(arguments: list[str]) -> int:
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    add_settings(parser)
    options = parser.parse_intermixed_args(arguments)

    from cluster.checks.before_run import check_run

    config = load_settings(options)
    run = check_run(config)
    from cluster.launchers.run import train_and_show

    return train_and_show(config, run.index, str(run.origin or ""))


if __name__ == "__main__":
    end(run(main))
