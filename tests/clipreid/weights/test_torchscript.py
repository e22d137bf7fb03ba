"""TorchScript archives are data: read as torch reads them, and nothing that is in them is run."""

import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from clipreid.errors import ModelError
from clipreid.weights.pretrained import read_state_dict
from tests.helpers.damage import flips
from tests.helpers.runs import ROOT, environment

WITHIN_S = 120
"""For all hostile files together, torch's import with them."""
MOST_BYTES = 300 << 20


class Part(nn.Module):
    plain: torch.Tensor
    maybe: torch.Tensor | None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("temporary", torch.ones(1, dtype=torch.float64), persistent=False)
        self.plain, self.maybe, self.bias = torch.ones(2), torch.ones(5), None
        self.named = {"x": torch.zeros(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.again = Part()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm2d(2)])
        self.tied = self.layers[0].weight
        self.turned = nn.Parameter(torch.randn(4, 6).half().t())
        self.empty = nn.Parameter(torch.empty(0, 3).bfloat16())
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def saved(module, path):
    torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(1, 2))])
def test_an_archive_is_read_as_torch_itself_reads_it(make, tmp_path):
    torch.jit.save(make(Whole()), tmp_path / "whole.pt")
    expected = torch.jit.load(tmp_path / "whole.pt").state_dict()
    found = read_state_dict(tmp_path / "whole.pt")
    assert {"first.temporary", "again.weight", "tied", "empty"} <= found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


class Filled(nn.Module):
    """Runs `act` when torch reads it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.act(state[0])
        self.weight, self.training = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MapsAFile(Filled):
    def act(self, x: torch.Tensor) -> None:
        torch.from_file("VICTIM", True, 4).fill_(7.0)


class Saves(Filled):
    def act(self, x: torch.Tensor) -> None:
        torch.save(x, "TRACE")


class Loops(Filled):
    def act(self, x: torch.Tensor) -> None:
        while bool(x[0] > 0):
            x = x + 1


class Allocates(Filled):
    def act(self, x: torch.Tensor) -> None:
        torch.ones(1 << 34)


def with_pickle(path, content, **members):
    """An archive of another pickle, and members of one's own making."""
    saved(nn.Linear(2, 2), path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(held)).split("/")[0]
    held |= {f"{root}/data.pkl": content} | {f"{root}/{name}": data for name, data in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if len(data) > MOST_BYTES else zipfile.ZIP_STORED)


LINEAR = b"\x80\x02c__torch__.torch.nn.modules.linear\nLinear\nq\x00)\x81q\x01}q\x02("
"""A pickle as far as the attributes of a linear layer, which is number 1."""


def text(words):
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def tensor(storage, length, size, stride):
    def row(numbers):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in numbers) + b"t"

    kept = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(storage) + text("cpu") + row([length])[1:] + b"Q"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + kept + b"K\x00" + row(size) + row(stride) + b"\x89)tR"


def linear(attributes):
    return LINEAR + attributes + b"ub."


def nested(depth):
    """Each module holds the next one twice."""
    if not depth:
        return LINEAR + b"ub"
    return (
        LINEAR
        + text("a")
        + nested(depth - 1)
        + bytes([ord("q"), depth + 9])
        + text("b")
        + b"h"
        + bytes([depth + 9])
        + b"ub"
    )


PICKLES = {
    "calls": b"cos\nsystem\n(" + text("touch TRACE") + b"tR.",
    "calls_by_name": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + text("touch TRACE") + b"tR.",
    "imports": b"ctrace_module\nwritten\n.",
    "huge_memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "huge_text": b"\x80\x02X\xff\xff\xff\xffabc.",
    "holds_itself": linear(text("a") + b"h\x01"),
    "holds_all_twice": nested(60) + b".",
    "keys_within_keys": b"\x80\x02)" + b"q\x05h\x05\x86" * 60 + b"q\x06}h\x06Ns.",
    "expanded": linear(text("weight") + tensor("0", 4, [1 << 30, 1 << 30], [0, 0])),
    "overflowing": linear(text("weight") + tensor("0", 4, [1 << 62, 4], [0, 0])),
    "outside": linear(text("weight") + tensor("0", 4, [9], [1])),
    "longer": linear(text("weight") + tensor("0", 1 << 40, [9], [1])),
    "missing": linear(text("weight") + tensor("77", 4, [4], [1])),
    "outside_its_folder": linear(text("weight") + tensor("../../../../etc/passwd", 4, [4], [1])),
    "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "many": b"\x80\x02" + b"}" * (8 << 20) + b".",
    "cut": linear(text("weight"))[:-9],
    "empty": b"",
}
MODULES = {"maps_a_file": MapsAFile, "saves": Saves, "loops": Loops, "allocates": Allocates}
READ_ALL = """
import re, sys, time
from pathlib import Path
from clipreid.errors import ModelError
from clipreid.weights.pretrained import read_state_dict

for file in sys.argv[1:]:
    start = time.process_time()
    try:
        print("read", file, read_state_dict(Path(file)).keys())
    except ModelError as error:
        print("refused", error)
    assert time.process_time() - start < 10, file
    peak_kb = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    assert peak_kb < 1_000_000, file
"""


def test_hostile_archives_leave_no_trace(tmp_path):
    """What would write, call, import, loop or fill the memory is refused in one line."""
    for name, content in PICKLES.items():
        with_pickle(tmp_path / f"{name}.pt", content)
    with_pickle(tmp_path / "unpacks.pt", linear(b""), **{"data/0": bytes(MOST_BYTES + 1)})
    for name, module in MODULES.items():
        saved(module(), tmp_path / f"{name}.pt")
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == len(PICKLES) + len(MODULES) + 1
    (tmp_path / "trace_module.py").write_text("open('TRACE', 'w')\nwritten = print\n")
    work = tmp_path / "work"
    work.mkdir()
    (work / "VICTIM").write_bytes(bytes(16))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, files)],
        cwd=work,
        env=environment(PYTHONPATH=f"{ROOT}:{tmp_path}"),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (work / "VICTIM").read_bytes() == bytes(16)
    assert [path.name for path in work.iterdir()] == ["VICTIM"]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"refused {file}" for file in files], done.stdout


def test_an_archive_that_needs_its_code_is_refused_with_the_way_to_convert_it(tmp_path):
    saved(Saves(), tmp_path / "saves.pt")
    with pytest.raises(ModelError, match=r"saves.pt: .* Saves is filled by code of its own; convert it .* torch.save"):
        read_state_dict(tmp_path / "saves.pt")


def test_an_archive_with_another_bit_is_refused_in_one_line_or_reads_the_same(tmp_path):
    path = saved(nn.Linear(3, 2), tmp_path / "linear.pt")
    expected, content = read_state_dict(path), path.read_bytes()
    for changed in flips(content, 200):
        path.write_bytes(changed)
        try:
            found = read_state_dict(path)
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(1 << 40),
        torch.empty(1 << 40, device="meta"),
        torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,), check_invariants=True),
    ],
)
def test_a_tensor_larger_than_the_file_is_refused(tensor, tmp_path):
    """A few bytes can stand for any size."""
    torch.save({"weight": tensor}, tmp_path / "large.pth")
    with pytest.raises(ModelError, match="large.pth: cannot be read as weights"):
        read_state_dict(tmp_path / "large.pth")
