"""What is secret in a URL is neither shown nor kept, and the URL works all the same."""

import logging

import pytest

from cluster.errors import ConfigError, TrainingError
from cluster.run.run_folder import CONFIG, RunFolder
from cluster.settings.yaml_file import load_config
from launch import cli
from shards.errors import DataError, StoreError, mask_logs, masked
from shards.storage import read_bytes
from tests.helpers.runs import config_file

SECRETS = ["user", "p4ss", "s3cret"]
SIGNED = "https://user:p4ss@host:9000/shards?X-Amz-Signature=s3cret&part=2"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:p4ss@host/a", "http://host/a"),
        ("s3://user:p@4ss@bucket/a: no such file", "s3://bucket/a: no such file"),
        ("sftp://user@host/a", "sftp://host/a"),
        ("simplecache::https://user:p4ss@host/a", "simplecache::https://host/a"),
        ("https://host/a?sv=1&sig=s3cret&se=2", "https://host/a?sv=1&sig=***&se=2"),
        ("https://host/a?token=s3cret", "https://host/a?token=***"),
        ("http://host/a/user@x", "http://host/a/user@x"),
        ("s3://bucket/a#b", "s3://bucket/a#b"),
        ("mail user@host about runs/one", "mail user@host about runs/one"),
    ],
)
def test_of_a_url_all_but_the_secret_is_shown(url, shown):
    assert masked(url) == shown and masked(f"two: {url} {url}") == f"two: {shown} {shown}"


@pytest.mark.parametrize("kind", [DataError, StoreError, ConfigError, TrainingError])
def test_no_error_shows_a_secret(kind):
    assert str(kind(f"{SIGNED}: failed")) == "https://host:9000/shards?X-Amz-Signature=***&part=2: failed"


def test_no_log_line_shows_a_secret_whoever_logs(capsys):
    before = logging.getLogRecordFactory()
    handler = logging.StreamHandler()
    logging.getLogger("a.library").addHandler(handler)
    try:
        mask_logs()
        mask_logs()
        logging.getLogger("a.library").warning("%s: gone after %d tries", SIGNED, 3)
        logging.getLogger("a.library").warning("half %d%% done", 50)
    finally:
        logging.setLogRecordFactory(before)
        logging.getLogger("a.library").removeHandler(handler)
    shown = capsys.readouterr().err
    assert "host:9000/shards" in shown and "gone after 3 tries" in shown and "half 50% done" in shown
    assert not [word for word in SECRETS if word in shown]


def test_the_settings_that_a_run_keeps_hold_no_secret_and_can_be_used_again(tmp_path):
    config = load_config(config_file(tmp_path), [f"data.shards={SIGNED}", f"run.dir={tmp_path / 'run'}"])
    RunFolder(config).close()
    kept = (tmp_path / "run" / CONFIG).read_text()
    assert not [word for word in SECRETS if word in kept]
    again = load_config(tmp_path / "run" / CONFIG, [f"data.shards={SIGNED}"])
    assert again == config and config.data.shards == SIGNED
    assert load_config(tmp_path / "run" / CONFIG).data.shards == masked(SIGNED)


def test_a_command_that_fails_shows_no_secret(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pack.py", "verify", "http://user:p4ss@127.0.0.1:9/set"])

    def main(arguments):
        return read_bytes(arguments[-1])

    assert cli.run(main) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: http://127.0.0.1:9/set") and not [word for word in SECRETS if word in shown]
