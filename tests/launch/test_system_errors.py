"""What the operating system refuses is one line with the path, whatever its number."""

import argparse
import errno
import os
import pickle

import pytest

from launch import cli
from launch.system_errors import system_mistake
from shards import storage


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_number_of_the_system_is_told_in_one_line_with_path_and_command(number):
    line = system_mistake(OSError(number, os.strerror(number), "/data/x"), "pack.py build")
    assert line.startswith("pack.py build: /data/x: ") and "\n" not in line
    assert os.strerror(number)[1:] in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), ("/full/x", "no space left", "make room")),
        (OSError(errno.EMFILE, "Too many open files", "/x"), ("too many open files", "ulimit -n")),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), ("/a -> /b", "cross-device")),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), ("temporary directory", "/tmp")),
        (ImportError("lib.so: cannot open shared object file: Too many open files"), ("lib.so", "ulimit -n")),
        (RuntimeError("unable to open shared memory: Too many open files (24)\nmore"), ("shared memory", "ulimit")),
        (MemoryError("Unable to allocate 9 TiB"), ("out of memory", "9 TiB")),
        (MemoryError(), ("out of memory",)),
    ],
)
def test_what_the_system_refused_is_told_with_its_remedy(error, words):
    line = system_mistake(error, "extract.py")
    assert "\n" not in line and all(word in line for word in words), line


def test_faults_of_the_program_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), ImportError("no module x"), ValueError("x"), KeyError("x")):
        assert system_mistake(error, "x") == ""


def test_a_write_that_finds_the_disk_full_names_its_file_also_from_another_process(tmp_path):
    target = str(tmp_path / "shard.tar")
    with pytest.raises(OSError) as caught, storage.write_atomic(target) as file:
        file.write(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() raises it, without a name
    assert pickle.loads(pickle.dumps(caught.value)).filename == target
    assert list(tmp_path.iterdir()) == []


def test_a_place_whose_working_file_cannot_be_made_is_refused_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.check_out(cli.Parser(prog="extract.py"), tmp_path / ("x" * 250))
    assert stop.value.code == 2 and "file name too long: choose a shorter name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"), [("a\0b", "NUL"), (f"a/{'x' * 256}/b", "256 bytes"), ("a/" * 3000, "4,095")]
)
def test_a_path_that_no_file_can_have_is_refused_in_one_short_line(path, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words) as caught:
        cli.place(path)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
