"""Runs to be compared: found, evaluated on one dataset by one rule, and put side by side.

    RUN RUN … ──▶ [compare runs]: weights, settings ──▶ query results ──▶ Comparison

Dataset, rule and draws are the first run's; descriptor, flip and precision are each run's own. Where a run was
evaluated otherwise in its training, a note says so.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from cluster.checks.before_run import check_evaluation
from cluster.comparison.comparison import Change, Comparison, compare, most_changed, short_names
from cluster.comparison.query_results import QueryResults, query_results
from cluster.errors import ConfigError
from cluster.evaluation.find_weights import Weights, open_weights
from cluster.evaluation.inference import Inference
from cluster.evaluation.metrics import ShowProgress
from cluster.evaluation.trained import METRICS, all_settings
from cluster.ranks.process import this_team
from cluster.settings.config import Config


@dataclass(frozen=True)
class Compared:
    """A comparison, and what it was made of."""

    comparison: Comparison
    results: list[QueryResults]
    image_size: tuple[int, int]
    """(H, W) of the first run's images, pixels."""

    def changes(self, count: int) -> list[tuple[str, QueryResults, list[Change]]]:
        """Of each run but the first: its name, its results, and the queries that changed most."""
        first, *others = self.results
        names = self.comparison.names[1:]
        return [(name, each, most_changed(first, each, count)) for name, each in zip(names, others, strict=True)]


def compare_runs(
    runs: Sequence[str], shards: str | None, resamples: int, seed: int, nearest: int, show: ShowProgress
) -> Compared | None:
    """None in all processes of torchrun but the first. shards: the dataset; None: the first run's.

    nearest: length of the ranked lists that the results hold.
    Raises ConfigError, ModelError, DataError: a run has no weights or settings, or they do not fit the dataset.
    """
    with ExitStack() as while_open:
        weights = [while_open.enter_context(open_weights(run)) for run in runs]
        configs = list(_configs(weights, shards))
        index = check_evaluation(configs[0])
        for each, config in zip(weights, configs, strict=True):
            each.check(config, index, METRICS)
        with this_team(configs[0].cluster) as team:
            results = [
                query_results(Inference(config, each.path, each.card, index, team), index, show, nearest)
                for each, config in zip(weights, configs, strict=True)
            ]
            if not team.is_first:
                return None
    settings = [all_settings(each.trained.settings or {}) for each in weights]
    comparison = compare(short_names(runs), settings, results, resamples, seed)
    return Compared(comparison, results, configs[0].model.image_size)


def _configs(weights: Sequence[Weights], shards: str | None) -> Iterator[Config]:
    """The settings of each run, with the first's of evaluation."""
    common = [] if shards is None else [f"data.shards={shards}"]
    for number, each in enumerate(weights):
        if each.trained.settings is None:
            why = each.trained.why_not or "it does not say what it was trained with"
            raise ConfigError(f"{each.trained.source}: {why}: name a run folder, or its model.safetensors")
        config = each.trained.config(common)
        if number == 0:
            rule, draws = config.eval.rule, config.eval.draws
            common = [f"data.shards={config.data.shards}", f"eval.rule={rule}", f"eval.draws={draws}"]
            common.append(f"run.seed={config.run.seed}")
        yield config
