"""A Ray of one machine: its token is this user's alone, and its files lie where nobody else gets. No Ray is started."""

import os
import tempfile

import pytest

from cluster.errors import ConfigError
from cluster.launchers.local_ray import local_options, ready_token
from tests.helpers.refusals import bound_by_modes


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path):
    return path.stat().st_mode & 0o777


def test_the_token_is_made_once_for_its_user_alone(home):
    before = os.umask(0)
    try:
        ready_token()
    finally:
        os.umask(before)
    token = home / ".ray" / "auth_token"
    made = token.read_text()
    assert (mode(token), mode(token.parent)) == (0o600, 0o700) and len(made) == 64
    ready_token()
    assert token.read_text() == made


@pytest.mark.parametrize("readable", [0o644, 0o640, 0o604])
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_token_that_others_can_read_is_refused_with_the_remedy(readable, address, home, monkeypatch):
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(readable)
    with pytest.raises(ConfigError, match=rf"{token}: .*read by others \(mode {readable:04o}\).* chmod 600 {token}"):
        ready_token()


@pytest.mark.parametrize("closed", ["", ".ray", ".ray/auth_token"])
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_home_that_this_user_may_not_read_is_refused_in_one_line_before_ray_starts(
    closed, address, home, monkeypatch
):
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("a" * 64)
    (home / ".ray" / "auth_token").chmod(0o600)
    (home / closed).chmod(0)
    try:
        with bound_by_modes(), pytest.raises(ConfigError, match="Permission denied.* set HOME to a folder") as caught:
            ready_token()
    finally:
        (home / closed).chmod(0o700)
    assert "\n" not in str(caught.value) and str(home / ".ray" / "auth_token") in str(caught.value)


def test_a_home_that_is_a_file_is_refused_in_one_line(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    with pytest.raises(ConfigError, match=f"{home / 'file'} is no folder.* set HOME to a folder"):
        ready_token()


def test_no_token_is_made_where_none_is_wanted_or_another_way_gives_it(home, monkeypatch):
    for name, value in (("RAY_AUTH_TOKEN", "a" * 64), ("RAY_AUTH_MODE", "disabled"), ("RAY_ADDRESS", "10.0.0.1:6379")):
        with monkeypatch.context() as given:
            given.setenv(name, value)
            ready_token()
    assert not (home / ".ray").exists()


def test_the_files_of_a_local_ray_lie_in_a_closed_folder(home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    home.chmod(0o1777)
    options = local_options()
    closed = home / f"ray-{os.getuid()}"
    assert options["_temp_dir"] == str(closed / "ray") and mode(closed) == 0o700
    home.chmod(0o700)
    assert "_temp_dir" not in local_options()
