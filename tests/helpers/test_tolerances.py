"""The comparisons that note how much of their tolerance they use."""

import numpy as np
import pytest
import torch

from tests.helpers.tolerances import FOLDER, close, table, within


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """A folder of this test's own: what fails here on purpose is not for the table of the run."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def test_what_is_further_off_than_allowed_fails_and_names_the_worst():
    close(torch.tensor([1.0, 2.0]), np.array([1.0, 2.1]), rtol=0.06)
    with pytest.raises(AssertionError, match=r"row 2\.0 is not 2\.5 ± 0\.1"):
        close(torch.tensor([1.0, 2.0]), [1.0, 2.5], rtol=0.04, what="row")
    with pytest.raises(AssertionError, match="mean is 0.2 off, 0.1 is allowed"):
        within(0.2, 0.1, "mean")


def test_what_is_not_a_number_or_of_another_shape_fails():
    for wrong in (np.nan, [1.0], np.inf):
        with pytest.raises(AssertionError):
            close(wrong, 1.0, atol=0.5)
    with pytest.raises(AssertionError):
        within(np.nan, 0.1)


def test_the_table_has_the_largest_share_of_each_tolerance_first(notes):
    for off in (0.01, 0.05, 0.02):
        within(off, 0.1)
    close(1.01, 1.0, atol=0.1)
    first, second = table(notes)
    assert first.startswith(" 0.5000 of 0.1") and first.endswith("(!)") and "test_tolerances.py:" in first
    assert second.startswith(" 0.1000 of 0.1") and not second.endswith("(!)")
