"""Feature files with another bit in them give the same features or are refused; never others."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError
from cluster.evaluation.feature_file import read_pair, write_features
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
