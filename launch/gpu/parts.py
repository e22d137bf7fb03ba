"""The parts of `bench.py gpu`, in the order of their worth: what is cut short by the clock is the last ones.

machine ──▶ [parts: commands with their limits] ──▶ running
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GPU_HELPER = "tests.helpers.devices"
"""What a file of tests imports that has some for a GPU."""


@dataclass(frozen=True)
class Part:
    """One command, `python WORDS`, in a process of its own."""

    name: str
    limit_s: int
    words: Sequence[str]
    writes: bool = False
    """Whether it takes `--out FILE` and writes its result there row by row; else it prints its result at the end."""
    environment: dict[str, str] = field(default_factory=dict)


def parts(rehearsal: bool, junit: Path) -> list[Part]:
    """rehearsal: on a CPU, in small sizes. junit: where the checks leave their results."""
    return [_checks(rehearsal, junit), *(_small() if rehearsal else _whole())]


def _bench(name: str, limit_s: int, words: str, benchmark: str = "", writes: bool = False) -> Part:
    return Part(name, limit_s, ["launch/bench.py", benchmark or name, *words.split()], writes)


def _checks(rehearsal: bool, junit: Path) -> Part:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={junit}", *gpu_tests()]
    return Part("checks", 120 if rehearsal else 80, words, environment={"GPU_TESTS_ON": "cpu"} if rehearsal else {})


def gpu_tests() -> list[str]:
    """Files with tests for a GPU, all of which can be read without Ray and DeepSpeed."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if f"from {GPU_HELPER} import" in file.read_text()]


def _whole() -> list[Part]:
    return [
        _bench("stage2", 110, "--modes eager graphs", writes=True),
        _bench("feed", 60, "", writes=True),
        _bench("evaluate", 45, "--size msmt17 --rounds 1 --sample 50"),
        _bench("rerank", 60, "--size msmt17"),
        _bench("stage1", 30, "--precision bf16"),
        _bench("kernels", 30, "--cases vit:256x128 --batch 64 --modes eager --kernels 20", "stage2", writes=True),
        _bench("engine", 45, "--cases vit:256x128 --modes engine", "stage2", writes=True),
        _bench("compiled", 240, "--cases vit:256x128 rn50:256x128 --modes compiled", "stage2", writes=True),
    ]


def _small() -> list[Part]:
    tiny, cpu = "configs/models/tiny_vit.json", "--device cpu"
    case = f"--cases {tiny}:32x16 --batch 8 --steps 1 {cpu}"
    sizes = f"--queries 60 --gallery 1500 --identities 40 --width 32 {cpu}"
    feed = f"--arch {tiny} --image-size 32x16 --jpeg 20x30 --identities 16 --loaders 1 --steps 3"
    return [
        _bench("stage2", 60, f"{case} --modes eager graphs", writes=True),
        _bench("feed", 60, f"{feed} --batch 8 --extract-batch 16 {cpu}", writes=True),
        _bench("evaluate", 60, f"{sizes} --rounds 1 --sample 20"),
        _bench("rerank", 60, sizes),
        _bench("stage1", 60, f"--arch {tiny} --batch 8 --identities 8 --rounds 1 --precision bf16 {cpu}"),
        _bench("kernels", 60, f"{case} --modes eager --kernels 20", "stage2", writes=True),
        _bench("engine", 60, f"{case} --modes engine", "stage2", writes=True),
        _bench("compiled", 120, f"{case} --modes compiled", "stage2", writes=True),
    ]
