"""A worker group that shrinks and grows with the cluster, but only to sizes that divide the batch.

Ray Train's own elastic policy takes any number of workers between min and max. This one rounds what the cluster
can hold down to the next size that splits a batch into whole identities.
"""

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class WholeIdentitiesPolicy(ElasticScalingPolicy):
    """`sizes`: the numbers of workers that may be, ascending."""

    def __init__(self, scaling_config: Any, sizes: list[int]):
        super().__init__(scaling_config)
        self.sizes = sizes

    def _get_num_workers_for_resource_request(self) -> int:
        return self.sizes[-1]

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """The largest size that fits; 0, which Ray takes as a reason to wait, where none does."""
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self.sizes if size <= possible), default=0)


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer whose worker group takes one of `sizes`. Ray offers no public way to hand in a policy."""

    def __init__(self, *args: Any, sizes: list[int], **options: Any):
        super().__init__(*args, **options)
        self.sizes = sizes

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = WholeIdentitiesPolicy(self.scaling_config, self.sizes)
        return super()._initialize_and_run_controller(**parts | {"scaling_policy": policy})
