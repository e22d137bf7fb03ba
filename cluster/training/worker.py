"""What every worker does, from shards to metrics: the same under Ray Train, torchrun, and alone.

    shards ──▶ untrained metrics ──▶ stage 1 ──▶ text features ──▶ stage 2 ──▶ metrics.json, model.safetensors

A run that was interrupted goes on from its newest complete checkpoint; what is finished is not done again.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipreid import stage1 as method
from clipreid.augment import normalise
from clipreid.errors import ModelError
from clipreid.identity_table import IdentityTable
from clipreid.model.prompts import PromptedText
from clipreid.weights.card import MODEL_FILE, ModelCard
from clipreid.weights.file import model_file
from clipreid.weights.initial import start
from clipreid.weights.sealed import Stored
from cluster.checks.preflight import preflight
from cluster.errors import ConfigError, Preempted
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.features import PassSettings, extract
from cluster.evaluation.trained import training_facts
from cluster.ranks.arithmetic import encoder_autocast, settled
from cluster.ranks.team import PATIENCE, Team
from cluster.run.interrupts import Interrupts, stop_signals
from cluster.run.manifest import Position
from cluster.run.reporter import Report, open_reporter
from cluster.run.run_folder import STAGE1_RESULT, read_metrics
from cluster.run.storage import Storage
from cluster.settings.config import Config, results_settings
from cluster.settings.model_spec import model_spec
from cluster.settings.paths import shipped_file
from cluster.training.checkpoint import Checkpoint, Retention, find_newest
from cluster.training.checkpoint_writer import CheckpointWriter, Due, Origin
from cluster.training.engine import Engine
from cluster.training.gathered import on_first_with_tables
from cluster.training.loop import Loop
from cluster.training.pieces import Slot
from cluster.training.stage1 import Stage1, encoder_hash, image_features
from cluster.training.stage1_result import Stage1Result
from cluster.training.stage2 import Stage2
from shards.loading.index import ShardIndex

COPIED_BYTES = 1 << 24
"""Of another run's file, at a time."""


def train(config: Config, team: Team, report: Report | None = None) -> dict[str, Any]:
    """Train as configured; metrics as in metrics.json, on every rank.

    report: takes the figures of every epoch, from all ranks (under Ray Train: `ray.train.report`).

    Raises:
        ConfigError, DataError, ModelError: mistakes that only show with weights and data at hand.
        Preempted: a stop was asked for; a checkpoint of the last step is complete.
        TrainingError: a loss was not finite, or a checkpoint could not be written.
    """
    table = preflight(config, team)
    run = Run(fit_loaders(config, team.cpus), team, report)
    try:
        run.reporter.workers(table)
        run.start()
        if run.wants_stage(1):
            run.stage1()
        if run.wants_stage(2):
            run.stage2()
        return run.finish()
    except (Preempted, KeyboardInterrupt):
        run.reporter.ended("stopped")
        raise
    except Exception as error:
        run.reporter.ended(f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        raise
    finally:
        run.reporter.close()


FIRST_STEP = "first step of stage {}, the longest: loaders start, memory is allocated"
"""What is being done until a stage's first step is: nothing is counted meanwhile."""


def fit_loaders(config: Config, cpus: int | None) -> Config:
    """The same settings with no more loaders than a worker has CPUs."""
    if cpus is None or config.data.loaders <= cpus:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"loaders": cpus})})


class Run:
    """One worker's view of a run, and the steps of `train` in their order."""

    def __init__(self, config: Config, team: Team, report: Report | None):
        self.config = config
        self.team = team
        self.storage = Storage(config.run.dir)
        self.index = ShardIndex.open(config.data.shards, config.data.cache_dir)
        self.train_split = self.index.split("train")
        self.spec = model_spec(config, self.index)
        pretrained = config.model.pretrained and shipped_file(config.model.pretrained)
        begun = start(self.spec, pretrained, config.run.seed, team, self.index.fingerprint)
        self.models = begun.models
        self.model, self.text, self.tables = self.models
        self.encoder_hash = encoder_hash(self.model)
        search = find_newest(self.storage, team, config.run.resume)
        self.resumed: Checkpoint | None = search.checkpoint
        if self.resumed:
            self._go_on_from(self.resumed)
        begun_with = self.resumed.manifest.settings.get("train.precision") if self.resumed else None
        self.config = config = settled(config, team, begun_with)
        self.writer = CheckpointWriter(
            self.storage,
            team,
            Origin(results_settings(config), self.index.fingerprint, self.encoder_hash),
            Retention(config.checkpoint.keep, search.passed_over),
            timeout_s=PATIENCE / 2 * config.cluster.timeout_s,
            newest=search.own(self.storage),
        )
        self.reporter = open_reporter(config, team, self.position, report)
        self.interrupts = Interrupts(self.storage, is_first=team.is_first, under_ray=report is not None)
        every = config.checkpoint
        self.due = Due(every.every_steps, every.every_minutes, every.every_epochs)
        self.metrics: dict[str, Any] = {}

    @property
    def position(self) -> Position | None:
        """What is done already, None at the beginning."""
        return None if self.resumed is None else self.resumed.position

    @property
    def prompts(self) -> PromptedText:
        """The text side, in the methods that train with one: weights without it were refused before the run."""
        assert self.text is not None
        return self.text

    @property
    def tokens(self) -> IdentityTable:
        """Of the prompts, likewise."""
        assert self.tables.tokens is not None
        return self.tables.tokens

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        """Raises ConfigError where the run began with other weights, or lacks what belongs to the checkpoint."""
        if checkpoint.manifest.encoder not in ("", self.encoder_hash):  # A file may be replaced: only its weights tell.
            raise ConfigError(
                f"model.pretrained: {self.config.model.pretrained} gives image encoder {self.encoder_hash}, but the "
                f"checkpoint {checkpoint.folder.url} began with {checkpoint.manifest.encoder}: use the same "
                "weights, or another run.dir"
            )
        if self.text is not None and 1 in self.config.stages and checkpoint.position.stage == 2:
            self.team.on_first(lambda: self._bring_stage1_result(checkpoint), "find stage 1's result")

    def _bring_stage1_result(self, checkpoint: Checkpoint) -> None:
        """A checkpoint of another run's stage 2 goes with the text features of that run."""
        theirs = Storage(checkpoint.folder.url.rsplit("/", 2)[0])
        faults: dict[str, str] = {}
        for storage in (self.storage, theirs):
            place = storage.place(STAGE1_RESULT)
            try:
                Stage1Result.read(place)
            except FileNotFoundError:
                faults[place] = f"{place}: no such file"
            except ModelError as error:
                faults[place] = str(error)
            else:
                if storage is theirs and theirs.url != self.storage.url:
                    with self.storage.writing(STAGE1_RESULT), theirs.open(STAGE1_RESULT) as file:
                        self.storage.write_pieces(STAGE1_RESULT, iter(partial(file.read, COPIED_BYTES), b""))
                return
        raise ConfigError(
            f"{'; '.join(faults.values())}; but checkpoint {checkpoint.folder.url} is in stage 2, which needs it: copy "
            "the file there from the run that wrote it, or choose another run.dir"
        )

    def start(self) -> None:
        """The untrained encoder's metrics, unless an earlier start of this run has them."""
        self.model.to(self.team.device)
        if self.text is not None:
            self.text.to(self.team.device)
        self.tables.to(self.team.device)
        known = self.team.on_first(lambda: read_metrics(self.storage), "read the metrics of an earlier start")
        if 2 not in self.config.stages:
            return
        untrained = known.get("untrained") if self.position else None
        self.metrics["untrained"] = untrained or self.evaluate("evaluate the untrained encoder")
        self._report_metrics()

    def _report_metrics(self) -> None:
        self.team.on_first(lambda: self.reporter.metrics(self.metrics), "write the metrics")

    def wants_stage(self, number: int) -> bool:
        return number in self.config.stages and (self.position is None or self.position.stage <= number)

    def evaluate(self, phase: str) -> dict[str, Any]:
        self.reporter.phase(phase)
        self.model.eval()
        # The encoder compiled for training has static shapes: every size of a batch would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            return evaluate(self.model, self.index, self.config, self.team, progress=self.reporter.images)

    def _evaluates(self, epoch: int) -> bool:
        """Whether metrics are due after an epoch of stage 2; those of the last one belong to the finished run."""
        every = self.config.eval.every_epochs
        return bool(every) and epoch % every == 0 and epoch != self.config.stage2.epochs

    def stage1(self) -> None:
        """Learn the prompt tokens and write them with the text features of all identities."""
        start = self._start_of(1)
        if not (start.epoch_done and start.epoch == self.config.stage1.epochs):
            self.model.eval()
            self.reporter.phase("encode the training images")
            settings, progress = PassSettings.of(self.config), self.reporter.images
            bank = extract(self._encode_frozen, self.index, "train", self.team, settings, progress)
            self.reporter.phase(FIRST_STEP.format(1))
            self.prompts.eval()
            stage = Stage1(self.config, self.team, self.prompts, self.tokens, bank, self.train_split)
            self._run(stage, start)
        elif self.resumed:  # A finished stage 1 whose result was not written yet.
            flat = self.tokens.block.detach().view(-1)
            slot = Slot(self.tokens.own.start * self.tokens.row_numel, flat)
            self.resumed.load_values({self.tokens.name: slot})
        self._stage1_result().write(self.storage, self.team)

    def _encode_frozen(self, images: Tensor, rows: Tensor) -> Tensor:
        pixels = normalise(images, self.config.data.pixel_mean, self.config.data.pixel_std)
        with encoder_autocast(self.config.train, pixels.device):
            return image_features(self.model, pixels)

    def _stage1_result(self) -> Stage1Result:
        """The bridge: every rank encodes the prompts of the identities that it owns."""
        texts = method.text_features(self.prompts, self.tokens, self.team)
        names, encoder = list(self.train_split.label_names), self.encoder_hash
        return Stage1Result(self.tokens, texts, names, self.index.fingerprint, encoder)

    def stage2(self) -> None:
        """Train the image encoder."""
        compiling = ", and the encoder is compiled" if self.config.train.compile else ""
        self.reporter.phase(FIRST_STEP.format(2) + compiling)
        stage = Stage2(self.config, self.team, self.models, self._text_features(), self.index)
        self._run(stage, self._start_of(2))

    def _text_features(self) -> IdentityTable | None:
        if self.config.method != "two_stage":
            return None
        if 1 not in self.config.stages and not self.config.stage1.result:
            return self._stage1_result().text_features  # The tokens came with model.pretrained.
        source = self.config.stage1.result or self.storage.place(STAGE1_RESULT)
        result = Stage1Result.read(source, self.team)
        result.check_fits(source, self.index.fingerprint, self.encoder_hash, self.spec.prompt_tokens)
        with torch.no_grad():
            self.tokens.block.copy_(result.tokens.block)
        return result.text_features.to(self.team.device)

    def _run(self, stage: Stage1 | Stage2, start: Position) -> None:
        self._restore(stage.engine, stage.number)
        loop = Loop(self.team, self.writer, self.due, self.reporter, self.interrupts)
        if stage.number == 2:
            loop.evaluates = self._evaluates
            loop.evaluate = lambda epoch: self.evaluate(f"evaluate epoch {epoch}")
        try:
            with stop_signals.saving_first():
                loop.run(stage, start)
        except BaseException:
            with suppress(Exception):  # What went wrong matters more, such as a lost rank: DeepSpeed needs them all.
                stage.close()
            raise
        stage.close()

    def _restore(self, engine: Engine, stage: int) -> None:
        if self.resumed and self.resumed.position.stage == stage:
            self.resumed.load(engine, self.team)

    def _start_of(self, stage: int) -> Position:
        if self.position is not None and self.position.stage == stage:
            return self.position
        return Position(stage, 1, 0, 0, False)

    def finish(self) -> dict[str, Any]:
        """Final metrics and weights; after stage 1 alone there is nothing to measure, and the weights are the encoder
        as it began and the learned prompts."""
        if 2 in self.config.stages:
            self.metrics = {**self.evaluate("evaluate"), **self.metrics}
            self._report_metrics()
        on_first_with_tables(self.team, list(self.tables), self._write_model, "write the model")
        self.team.on_first(self.reporter.finished, "write the log")
        return self.metrics

    def _write_model(self, tables: Mapping[str, Stored]) -> None:
        data = self.config.data
        facts = training_facts(self.config, self.index)
        card = ModelCard(self.spec, data.pixel_mean, data.pixel_std, self.config.eval.descriptor, facts)
        with self.storage.writing(MODEL_FILE):
            self.storage.write_pieces(MODEL_FILE, model_file(self.models, card, tables))
