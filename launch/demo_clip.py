"""Train the small CLIP that the demo starts from, on rendered pictures and their captions.

    python launch/demo_clip.py --out configs/models/demo_clip.safetensors

Prints what it knows of vehicles it never saw. Repeating a command goes on from the last whole epoch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, check_out, end, local_place, not_negative, positive, progress_bar, run

EXAMPLE = """examples:
  python launch/demo_clip.py --out configs/models/demo_clip.safetensors
  python launch/demo_clip.py --out small.safetensors --identities 200 --epochs 2"""
ARCH = "configs/models/small_vit.json"


def main(arguments: list[str]) -> int:
    parser = Parser(prog="demo_clip.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    parser.add_argument("--out", type=local_place, required=True, metavar="FILE.safetensors")
    parser.add_argument("--identities", type=positive, default=8000, help="vehicles to learn from")
    parser.add_argument("--images", type=positive, default=3, help="of each of them")
    parser.add_argument("--cameras", type=positive, default=60)
    parser.add_argument("--epochs", type=positive, default=12)
    parser.add_argument("--batch", type=positive, default=128, help="pictures in a step")
    parser.add_argument("--held-out", type=positive, default=500, help="other vehicles, of two pictures each, to check")
    parser.add_argument("--seed", type=not_negative, default=1_000_003, help="of pictures and weights")
    parser.add_argument("--work", type=local_place, default=Path("build/demo_clip"), metavar="DIR", help="checkpoint")
    options = parser.parse_args(arguments)
    check_out(parser, options.out)
    if options.identities * options.images < options.batch:
        parser.error(f"--batch {options.batch}: more than the {options.identities * options.images} pictures")
    return make(options)


def make(options: argparse.Namespace) -> int:
    import torch

    from clipreid.model.arch import check_arch
    from cluster.settings.paths import shipped_file
    from launch.small_clip.pictures import PictureSettings, render
    from launch.small_clip.training import THREADS, Epoch, Recipe, caption_vocabulary, new_clip, train
    from launch.small_clip.weights import rounded, write_clip
    from launch.small_clip.zero_shot import ask

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    arch = check_arch(shipped_file(ARCH))
    size = arch["vision_cfg"]["image_size"]
    counts = {"identities": options.identities, "images": options.images}
    with progress_bar("rendering") as progress:
        pictures = render(
            PictureSettings(options.seed, **counts, cameras=options.cameras, size=size), progress=progress
        )
    held_out = render(PictureSettings(options.seed + 1, options.held_out, 2, options.cameras, size, "bilinear"))
    vocabulary = caption_vocabulary()
    clip = new_clip(arch, vocabulary, options.seed)
    recipe = Recipe(seed=options.seed, epochs=options.epochs, batch=options.batch)

    def tell(epoch: Epoch) -> None:
        print(f"epoch {epoch.epoch}/{recipe.epochs}: loss {epoch.loss:.4f}, scale {epoch.scale:.1f}", flush=True)

    options.work.mkdir(parents=True, exist_ok=True)
    train(clip, pictures, vocabulary, recipe, options.work / "checkpoint.pt", tell)
    clip.load_state_dict(rounded(clip.state_dict()))
    answers = ask(clip, held_out, vocabulary)
    for question, answer in answers.items():
        print(
            f"{question}: {answer.right:.1%} right on {len(held_out.pixels):,} pictures of vehicles never seen; "
            f"chance {answer.chance:.1%}, the commonest answer {answer.commonest:.1%}"
        )
    made: dict[str, Any] = {"seed": options.seed, **counts, "cameras": options.cameras, "epochs": recipe.epochs}
    made |= {"batch": recipe.batch, "zero_shot": {name: round(answer.right, 4) for name, answer in answers.items()}}
    write_clip(options.out, clip.state_dict(), vocabulary, arch, made)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    end(run(main))
