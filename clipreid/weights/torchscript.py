"""The tensors of a TorchScript archive, read without running what is in it.

    archive.pt ──▶ [torchscript] ──▶ pretrained

`torch.jit.load` runs the archive's own code, its `__setstate__` for one, which may write files or never end. Here the
archive is data: a zip file with one member for each storage, `data.pkl`, which says of which storages the tensors are
and in which modules they stand, and the modules' source, of which only the lists of parameters and buffers are read.
Of the pickle's instructions those are followed that put plain values together; what it would call is a name.
"""

import pickletools
import re
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_PICKLE_BYTES = 4 << 20
"""Of data.pkl: a hundred bytes a tensor."""
MOST_SOURCE_BYTES = 64 << 20
MOST_NAMES = 100_000
DEEPEST = 64
"""Modules within modules. A module that holds itself is deeper."""
CONVERT = (
    'convert it where its code may run: torch.save(torch.jit.load(FILE, map_location="cpu").state_dict(), "weights.pt")'
)

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_MODULE_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  __\w+__ = \[.*\]\n)*)", re.MULTILINE)
_LIST_OF_TENSORS = re.compile(r"__(?:parameters|buffers)__ = \[(.*)\]")


@dataclass
class Made:
    """What the pickle would have made by a call."""

    name: Any
    """Of the class or function, "module name"."""
    arguments: Any
    state: Any = None
    """What it would have been filled with."""


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """{name: Tensor} of all parameters and buffers, as `torch.jit.load(path).state_dict()` has them.

    Raises ValueError, one line, for what is none, or needs its code to be read; and as zipfile and torch do for
    members that are not as they should be.
    """
    with zipfile.ZipFile(path) as file:
        archive = _Archive(file)
        return archive.state_dict(read_values(archive.pickle()))


def read_values(pickle: bytes) -> Any:
    """The value that a pickle describes, of dictionaries, lists, tuples, numbers and text, and `Made`.

    Raises ValueError for instructions that TorchScript does not write.
    """
    values: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for instruction, argument, _ in pickletools.genops(pickle):
            _follow(instruction.name, argument, values, marks, memo)
        (value,) = values
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"data.pkl puts nothing whole together ({type(error).__name__}: {error})") from None
    return value


def _follow(name: str, argument: Any, values: list[Any], marks: list[int], memo: dict[int, Any]) -> None:
    """One instruction of the pickle."""
    match name:
        case "PROTO" | "STOP":
            pass
        case "GLOBAL" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
            values.append(argument)
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            values.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
            values.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = values[-1]
        case "BINGET" | "LONG_BINGET":
            values.append(memo[argument])
        case "MARK":
            marks.append(len(values))
        case "TUPLE":
            values.append(tuple(_taken(values, marks.pop())))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            values.append(tuple(_taken(values, len(values) - int(name[-1]))))
        case "APPEND" | "APPENDS":
            more = _taken(values, len(values) - 1 if name == "APPEND" else marks.pop())
            values[-1].extend(more)
        case "SETITEM" | "SETITEMS":
            pairs = _taken(values, len(values) - 2 if name == "SETITEM" else marks.pop())
            if not all(isinstance(key, str | int | float) for key in pairs[::2]):
                raise ValueError("data.pkl has a dictionary whose keys are neither text nor numbers")
            values[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        case "REDUCE" | "NEWOBJ":
            values.append(Made(*_taken(values, len(values) - 2)))
        case "BINPERSID":
            values.append(Made("storage", values.pop()))
        case "BUILD":
            (state,) = _taken(values, len(values) - 1)
            values[-1].state = state
        case _:
            raise ValueError(f"data.pkl has an instruction {name}, which TorchScript does not write")


def _taken(values: list[Any], start: int) -> list[Any]:
    """The values from `start` on, taken away."""
    if start < 0:
        raise IndexError("too few values")
    taken = values[start:]
    del values[start:]
    return taken


@dataclass
class _Archive:
    file: zipfile.ZipFile
    root: str = ""
    """The folder in the zip file that holds all."""
    storages: dict[str, bytearray] = field(default_factory=dict)
    sources: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """{member: {class: its parameters and buffers}}."""

    def __post_init__(self) -> None:
        roots = [name.removesuffix("/constants.pkl") for name in self.file.namelist() if name.endswith("constants.pkl")]
        if len(roots) != 1:
            raise ValueError("is more than one archive")
        (self.root,) = roots
        order = f"{self.root}/byteorder"
        if order in self.file.namelist() and self._read(order, 16) != sys.byteorder.encode():
            raise ValueError(f"was written on a machine of another byte order; {CONVERT}")

    def pickle(self) -> bytes:
        return self._read(f"{self.root}/data.pkl", MOST_PICKLE_BYTES)

    def _read(self, member: str, most_bytes: int) -> bytes:
        if self.file.getinfo(member).file_size > most_bytes:
            raise ValueError(f"{member} would be {self.file.getinfo(member).file_size} bytes, more than {most_bytes}")
        return self.file.read(member)

    def state_dict(self, root: Any) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        modules, seen = [("", root)], 0
        while modules:
            prefix, module = modules.pop()
            seen += 1
            if seen > MOST_NAMES or prefix.count(".") > DEEPEST:
                raise ValueError("its modules hold each other without end")
            own = self._tensors_of(module)
            if own is None:
                continue
            if not isinstance(module.state, dict):
                raise ValueError(f"{module.name.split()[-1]} is filled by code of its own; {CONVERT}")
            for name, value in module.state.items():
                if name in own and isinstance(value, Made):
                    state[prefix + name] = self._tensor(value)
                elif isinstance(value, Made):
                    modules.append((f"{prefix}{name}.", value))
        return state

    def _tensors_of(self, value: Any) -> list[str] | None:
        """Names of a module's parameters and buffers, by its class; None for what is no module."""
        if not isinstance(value, Made) or not str(value.name).startswith("__torch__"):
            return None
        module, _, name = value.name.partition(" ")
        member = f"{self.root}/code/{module.replace('.', '/')}.py"
        if member not in self.sources:
            source = self._read(member, MOST_SOURCE_BYTES).decode()
            self.sources[member] = {
                found[1]: re.findall(r'"([^"]*)"', " ".join(_LIST_OF_TENSORS.findall(found[2])))
                for found in _MODULE_CLASS.finditer(source)
            }
        return self.sources[member].get(name)

    def _tensor(self, made: Made) -> Tensor:
        """A view of its storage, which must be as long as the pickle says."""
        if made.name != _TENSOR:
            raise ValueError(f"holds a tensor of another kind ({made.name}); {CONVERT}")
        storage, offset, size, stride, *_ = made.arguments
        _, kind, key, _, length = storage.arguments
        if kind not in _DTYPES:
            raise ValueError(f"holds a tensor of another kind ({kind}); {CONVERT}")
        member, dtype = f"{self.root}/data/{key}", _DTYPES[kind]
        if key not in self.storages:
            self.storages[key] = bytearray(self.file.read(member))
        data = self.storages[key]
        if len(data) != length * dtype.itemsize:
            raise ValueError(f"{member} is {len(data)} bytes for {length} numbers of {dtype}")
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.as_strided(size, stride, offset)
