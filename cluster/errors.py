"""What can go wrong in a run, as types: a mistake in the settings, or a failure that stops training."""

from shards.errors import masked


class ConfigError(ValueError):
    """A user's mistake in the settings. One line per fault; each names the key, its value, and the remedy."""

    def __str__(self) -> str:
        return masked(super().__str__())


class TrainingError(RuntimeError):
    """Training cannot go on, and a restart would not help. The message names stage, epoch, step and cause."""

    def __str__(self) -> str:
        return masked(super().__str__())


class Preempted(Exception):
    """The run was asked to stop. Where workers were training, a checkpoint of their last step is written."""


class Drained(Preempted):
    """A worker's node is about to be taken away; the workers are wanted again on other nodes."""


class RankLost(RuntimeError):
    """A collective failed because ranks did not come to it; a restart from the newest checkpoint helps."""

    def __init__(self, rank: int, operation: str, waited_s: float, missing: dict[int, str], cause: str):
        super().__init__(rank, operation, waited_s, missing, cause)  # All of them, so that it survives pickling.
        self.rank, self.operation, self.waited_s, self.missing, self.cause = rank, operation, waited_s, missing, cause

    def __str__(self) -> str:
        who = "; ".join(f"rank {rank}: {state}" for rank, state in sorted(self.missing.items()))
        return (
            f"rank {self.rank} waited {self.waited_s:.0f} s in '{self.operation}'; "
            f"did not arrive: {who or 'none known, the connection broke'} ({self.cause})"
        )
