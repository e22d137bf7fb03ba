"""Write a run's weights in the format of another system.

    python launch/export.py --weights runs/demo --format official --out demo.pth

The format `official` loads into the model of CLIP-ReID's authors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, check_out, end, local_place, owned_result, place, run

EXAMPLE = """example:
  python launch/export.py --weights runs/veri776_vit --format official --out ViT-B-16_60.pth

The format `official` is that of the checkpoints released by CLIP-ReID's authors: a state dict that loads into their
model (image encoder, necks, classifiers, side information, prompts and text encoder)."""


def main(arguments: list[str]) -> None:
    parser = Parser(prog="export.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    parser.add_argument(
        "--weights",
        required=True,
        type=place,
        metavar="RUN|FILE",
        help="run folder, or its model.safetensors; also a URL",
    )
    parser.add_argument("--format", required=True, choices=["official"], help="format to write")
    parser.add_argument("--out", required=True, type=local_place, metavar="FILE", help="file to write")
    options = parser.parse_args(arguments)
    check_out(parser, options.out)
    if Path(options.weights).suffix in (".pth", ".pt", ".bin"):
        parser.error(
            f"--weights {options.weights}: give a run folder or its model.safetensors; such a file is no run's, but a "
            "checkpoint of CLIP-ReID's authors, which needs no export, or CLIP weights"
        )

    from cluster.evaluation.find_weights import local_weights

    with owned_result(options.out, "exporting"), local_weights(options.weights) as path:
        from clipreid.weights.card import read_card
        from clipreid.weights.file import load_state
        from clipreid.weights.official import save_official
        from clipreid.weights.tables import TOKENS

        spec, state = read_card(path).spec, load_state(path)
        save_official(options.out, state, spec)
    sides = "image and text side" if TOKENS in state else "image side (the run has no text side)"
    print(f"{options.out}: {sides} of {spec.arch}, {spec.identities} identities, in the format {options.format}")


if __name__ == "__main__":
    end(run(main))
