"""What is refused before any worker starts, of a dataset whose images have no identities."""

import pytest

from cluster.checks.before_run import check_evaluation, check_run
from cluster.errors import ConfigError
from cluster.settings.yaml_file import parse_config
from tests.helpers.shards import write_shards

KNOWN = {"train": {"a": 4, "b": 4}, "query": {"x": 2}, "gallery": {"x": 2}}


@pytest.fixture
def configured(tmp_path):
    """The settings for a packed dataset of these identities."""

    def make(**splits):
        write_shards(tmp_path / "set", KNOWN | splits)
        model = {"arch": "configs/models/tiny_vit.json", "pretrained": None, "image_size": [32, 32]}
        data = {"shards": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
        return parse_config({"data": data, "model": model, "stage2": {"identities": 2}, "run": {"dir": str(tmp_path)}})

    return make


@pytest.mark.parametrize("unknown", ["", "-1"])
def test_training_images_without_an_identity_are_not_one_class(configured, unknown):
    config = configured(train={"a": 4, "b": 4, unknown: 3})
    with pytest.raises(ConfigError, match="set has 3 training images without an identity, shard train-000000.tar, key"):
        check_run(config)
    check_evaluation(config)


@pytest.mark.parametrize("split", ["query", "gallery"])
def test_a_split_of_which_no_identity_is_known_has_nothing_to_evaluate(configured, split):
    config = configured(**{split: {"": 2, "-1": 2}})
    reason = f"set knows no identity of split {split}, so there is nothing to evaluate: pack the dataset with"
    for check in (check_run, check_evaluation):
        with pytest.raises(ConfigError, match=reason):
            check(config)


def test_some_images_of_unknown_identity_may_be_evaluated(configured):
    config = configured(query={"x": 2, "": 3}, gallery={"x": 2, "-1": 3})
    check_run(config)
    check_evaluation(config)


def test_a_resnet_is_not_trained_in_pieces(configured):
    config = configured()
    model = config.model.model_copy(update={"arch": "configs/models/tiny_rn.json"})
    train = config.train.model_copy(update={"micro_batch": 8})
    with pytest.raises(ConfigError, match=r"train.micro_batch: 8, but .*tiny_rn.json is a ResNet, whose BatchNorm"):
        check_run(config.model_copy(update={"model": model, "train": train}))
