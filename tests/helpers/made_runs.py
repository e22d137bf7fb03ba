"""Folders as finished runs leave them, with weights that were never trained: quickly made, for what only reads them.

shards, seed ──▶ [made_run] ──▶ RUN/config.yaml, RUN/model.safetensors
"""

from clipreid.weights.card import ModelCard
from clipreid.weights.file import save_model
from clipreid.weights.initial import build_models
from cluster.evaluation.trained import training_facts
from cluster.settings.model_spec import model_spec
from cluster.settings.yaml_file import dump_config, load_config
from shards.loading.index import ShardIndex
from tests.helpers.runs import config_file, overrides


def made_run(folder, shards, seed=0, **changes):
    """Its folder, as text. Weights differ by the seed; changes: settings as of `overrides`."""
    folder.mkdir(parents=True)
    arguments = overrides(shards, folder, run__seed=seed, cluster__launcher="local", **changes)
    config, index = load_config(config_file(folder), arguments), ShardIndex.open(str(shards))
    spec, data = model_spec(config, index), config.data
    card = ModelCard(spec, data.pixel_mean, data.pixel_std, config.eval.descriptor, training_facts(config, index))
    save_model(folder / "model.safetensors", build_models(spec, None, seed), card)
    (folder / "config.yaml").write_text(dump_config(config))
    return str(folder)
