"""What is changed in Ray Train's trainer: sizes of the worker group, and one actor less. No cluster is started."""

import pytest
from ray.train import ScalingConfig

from cluster.trainer import Trainer, WholeIdentitiesPolicy

NODES = {"one": {"CPU": 2.0}, "two": {"CPU": 5.0}}


@pytest.mark.parametrize("placement, possible", [("PACK", 4), ("SPREAD", 4), ("STRICT_SPREAD", 2), ("STRICT_PACK", 4)])
def test_an_elastic_group_has_the_largest_size_that_divides_the_batch_and_fits_its_placement(placement, possible):
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1}, placement_strategy=placement)
    policy = WholeIdentitiesPolicy(scaling, sizes=[1, 2, 4, 8])
    assert policy._count_possible_workers(NODES) == possible
    assert policy._count_possible_workers({"one": NODES["one"]}) == (1 if placement == "STRICT_SPREAD" else 2)
    assert policy._count_possible_workers({}) == 0


def test_rays_cleaner_which_may_ask_another_cluster_on_the_machine_is_left_out():
    trainer = Trainer(print, sizes=[1], scaling_config=ScalingConfig(num_workers=1))
    ours = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    theirs = {type(callback).__name__ for callback in super(Trainer, trainer)._create_default_callbacks()}
    assert theirs - ours == {"PlacementGroupCleanerCallback"}
