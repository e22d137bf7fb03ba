"""Feature files with another bit in them give the same features or are refused; never others."""

import io
import os
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError
from cluster.evaluation.feature_file import read_pair, write_features
from shards.errors import DataError
from tests.helpers.damage import TORN, flips

ARRAYS = {
    "features": np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32),
    "identities": np.array([f"id{n % 7}" for n in range(40)]),
    "cameras": np.arange(40) % 3,
    "keys": np.array([f"key{n}" for n in range(40)]),
}


def same(found):
    return all(np.array_equal(getattr(found, name), values) for name, values in ARRAYS.items() if name != "keys")


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_a_feature_file_with_another_bit_or_torn_is_refused_in_one_line_or_reads_the_same(tmp_path, ending):
    path = tmp_path / f"all.{ending}"
    write_features(path, ARRAYS)
    assert same(read_pair([str(path)] * 2, "camera")[0])
    files = [path] if path.is_file() else sorted(path.iterdir())
    refused = 0
    for file in files:
        content = file.read_bytes()
        for changed in [*flips(content, 200), *(tear(content) for tear in TORN.values())]:
            file.write_bytes(changed)
            try:
                assert same(read_pair([str(path)] * 2, "camera")[0])
            except ConfigError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                refused += 1
        file.write_bytes(content)
    assert refused > 100


def test_a_folder_of_parts_that_lacks_one_is_refused_and_other_programs_read_it_as_one_table(tmp_path):
    path = tmp_path / "all.parquet"
    write_features(path, ARRAYS)
    assert pq.read_table(path).num_rows == 40
    part = path / "part-00000.parquet"
    part.rename(path / "part-00001.parquet")
    with pytest.raises(ConfigError, match="part-00000.parquet: no such file, but _checksums.json lists it"):
        read_pair([str(path)] * 2, "camera")
    (path / "_checksums.json").unlink()
    assert same(read_pair([str(path)] * 2, "camera")[0])


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            file.writestr(name, content)
    return str(path)


def array_of(shape, data, kind="<f4"):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (array_of((40, 8), bytes(100)), "holds 100 bytes"),
        (array_of((10**9, 10**6), bytes(64)), "holds 64 bytes"),
        (array_of((1 << 62, 4), b""), "holds 0 bytes"),
        (array_of((2,), bytes(16), "|O"), "Python objects"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118, "not a complete"),
        (b"\x93NUMPY\x01\x00\x76\x00{'descr': '" + b"x" * 107, "not a complete"),
        (b"", "not a complete"),
    ],
)
def test_an_array_that_is_not_as_long_as_its_header_says_is_refused_before_memory_is_taken(features, words, tmp_path):
    rest = [(f"{name}.npy", array_of((40,), bytes(320), "<i8")) for name in ("identities", "cameras")]
    for odd in ([("features.npy", features), *rest], [*rest, ("features.npy", features)]):
        path = archive(tmp_path / "f.npz", odd)
        with pytest.raises(ConfigError, match=words) as caught:
            read_pair([path, path], "camera")
        assert "\n" not in str(caught.value) and path in str(caught.value)


def test_a_pipe_as_a_feature_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "f.npz")
    with pytest.raises(DataError, match="a pipe, not a file"):
        read_pair([str(tmp_path / "f.npz")], "none")


def test_a_file_with_an_array_twice_is_refused(tmp_path):
    twice = [("features.npy", array_of((2, 1), bytes(8))), ("features.npy", array_of((2, 1), b"\1" * 8))]
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="twice"):
        read_pair([archive(tmp_path / "f.npz", twice)], "none")
