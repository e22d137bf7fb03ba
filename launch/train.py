"""Train, evaluate, and write a run folder. Also what `ray job submit` runs.

python launch/train.py --config configs/demo.yaml stage2.epochs=10
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, run

EXAMPLE = """examples:
  python launch/train.py --config configs/demo.yaml
  python launch/train.py --config configs/veri776_vit.yaml data.shards=s3://bucket/veri776 cluster.workers=8
  torchrun --nproc-per-node 2 launch/train.py --config configs/demo.yaml cluster.launcher=torchrun
  ray job submit --working-dir . -- python launch/train.py --config configs/demo.yaml
Repeating a command goes on from the run's newest checkpoint."""


def main(arguments: list[str]) -> int:
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML settings, for example configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    options = parser.parse_intermixed_args(arguments)

    from cluster.checks.before_run import check_run
    from cluster.settings.paths import with_absolute_paths
    from cluster.settings.yaml_file import load_config

    config = with_absolute_paths(load_config(options.config, options.overrides))
    index, _ = check_run(config)
    from cluster.launchers.run import train_and_show

    return train_and_show(config, index)


if __name__ == "__main__":
    sys.exit(run(main))
