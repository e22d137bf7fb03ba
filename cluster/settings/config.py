"""Typed, closed settings of a run, and what they have to do with each other.

    configs/*.yaml ──yaml_file──▶ [config] ──checks──▶ workers

Imports neither torch nor Ray, so that a mistake shows at once. What needs the dataset or the model's name is checked in
`cluster/checks/before_run.py`, also before any worker starts. Tables and equations are those of the CLIP-ReID paper;
"published" are the settings of its authors' released runs, which `configs/` has for every dataset.

Every path keeps one rule: `~` is the home folder, a relative path starts at the folder that the command is called in,
and so do the paths in a settings file; only a file's `base:` starts at that file. See `paths.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from clipreid.loss_settings import TextLoss
from clipreid.model.spec import FeatureName, Sie, SieTokens
from clipreid.retrieval.rules import Rule

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
"""Bounded, as all numbers: what is made in a number's size is not to fill the memory for a slip of the keyboard."""
Whole = Annotated[int, Field(ge=0, le=1_000_000_000)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
RGB = tuple[float, float, float]
Spread = Annotated[float, Field(ge=1e-6)]
AUTO = "auto"
"""Leaves a setting of `train` to the device."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class PathMark:
    """Says of a setting that its text is a path or an fsspec URL. Where a path starts is one rule, in `paths.py`."""

    words: tuple[str, ...] = ()
    """Values that are no paths."""
    suffixes: tuple[str, ...] = ()
    """Where given, text is a name that others know, unless it ends in one of these or has a slash in it."""
    shipped: bool = False
    """A file of this project may be named as well, by its path below the project's root."""


NotEmpty = Field(min_length=1)
Place = Annotated[str, NotEmpty, PathMark()]
CheckpointPath = Annotated[str, NotEmpty, PathMark(words=("auto", "never"))]
WeightsPath = Annotated[str, NotEmpty, PathMark(suffixes=WEIGHT_SUFFIXES, shipped=True)]
ArchPath = Annotated[str, NotEmpty, PathMark(suffixes=(".json",), shipped=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as switches, and Python counts with switches as 1 and 0."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if bool not in (kind, *get_args(kind)) and any(
            isinstance(one, bool) for one in (value if isinstance(value, list) else [value])
        ):
            raise ValueError("holds a switch (yes, no, true, ...) where a number is meant")
        return value


class RunSection(Section):
    dir: Place = "runs/run"
    """Run folder: a path or fsspec URL that every node sees."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes initial weights, data order and augmentation."""
    resume: CheckpointPath = "auto"
    """auto: go on from the newest complete checkpoint; never: refuse a folder that has one; or the path of a checkpoint
    to begin from, while the folder has none."""


class DataSection(Section):
    shards: Place
    """Folder or fsspec URL that `launch/pack.py build` wrote."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a corrupt record of a PK batch does: stop, or give its place to the identity's next image."""
    skip_limit: Whole = 100
    """Different images that `on_error: skip` passes over on a worker; one more stops the run."""
    locality: Literal["none", "node"] = "none"
    """node: each virtual node fills its part of every batch from its own shards of the epoch."""
    virtual_nodes: Count = 8
    """Number of virtual nodes for `locality: node`; divides stage2.identities."""
    sampler: Literal["identity", "camera_aware", "balanced"] = "identity"
    """How PK batches are drawn. identity: as published. camera_aware: an identity's images in a batch come from as many
    of its cameras as they can, so not all images equally often. balanced: see `balance_alpha`."""
    balance_alpha: NonNegative = 0.5
    """`balanced` draws an identity with probability proportional to (its images) ** alpha."""
    cache_dir: Place | None = None
    """Node-local folder for remote shards and feature banks; default: under the system's temporary folder. In one that
    others can write to, a folder of yours."""
    cache_gb: Annotated[float, Field(gt=0, le=1_000_000_000)] = 50.0
    """Size limit of that cache, GB."""
    loaders: Annotated[int, Field(ge=0, le=1024)] = 2
    """Decoding processes per worker; 0 decodes in the worker itself."""
    pixel_mean: RGB = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0 … 1, per channel. Published: 0.5 for the ViT, ImageNet's mean for RN50."""
    pixel_std: tuple[Spread, Spread, Spread] = (0.5, 0.5, 0.5)
    """Divides pixels after that, per channel. Published: 0.5 for the ViT, ImageNet's for RN50."""


class ModelSection(Section):
    arch: ArchPath = "ViT-B-16-quickgelu"
    """open_clip model name, or the path of a JSON file in open_clip's model format."""
    pretrained: WeightsPath | None = "openai"
    """What a run begins with: a tag of open_clip's weights; a local file of CLIP's (TorchScript archive, state_dict,
    safetensors); or a run folder, a model.safetensors or a checkpoint of the authors, of any number of identities: then
    encoders, necks and side information that fits are kept, and what is of other identities begins anew, and the
    settings of the model that are not given are those of a run's. null: random weights."""
    image_size: tuple[Pixels, Pixels] = (256, 128)
    """Height and width, pixels."""
    stride: Count | None = None
    """Stride of the ViT's patches, pixels (12 = overlapping patches, OLP); null: the patch size."""
    sie: Sie = "none"
    """Side information (SIE, Table 7): a learned vector for each camera, view, or pair of them; for a ViT only."""
    sie_tokens: SieTokens = "cls"
    """Tokens that side information is added to: the class token, or all of them (Table 7)."""
    sie_coefficient: float = 1.0
    """Factor on side information. Published: 1."""
    prompt_tokens: Count = 4
    """M, learnable tokens per identity (Table 10)."""


class Stage1Section(Section):
    epochs: Count = 120
    """Passes over the training images. Published: 120 for a ViT on person datasets, 60 for all others."""
    lr: Positive = 3.5e-4
    """Learning rate of the prompt tokens: warm-up leads towards it, the cosine falls from it, epoch by epoch."""
    batch: Count = 64
    """Images in one global batch, over all workers; with `features: average` identities. Published: 64; 256 for
    VehicleID."""
    features: Literal["instance", "average"] = "instance"
    """Image features as they are, or their mean over each identity (Table 8): then an identity's text is told from the
    means of all identities (Eq. 10), without a loss from image to text."""
    weight_decay: NonNegative = 1e-4
    """L2 decay of the prompt tokens, part of Adam's gradient (not AdamW)."""
    warmup_epochs: Whole = 5
    """Epochs of linear warm-up; the cosine's clock runs through them, so `lr` itself is never reached. 0: none, and the
    cosine falls from `lr`."""
    warmup_lr: NonNegative = 1e-5
    """Learning rate at which warm-up begins, at epoch 0."""
    min_lr: NonNegative = 1e-6
    """Learning rate at which the cosine ends, in the last epoch."""
    result: Place | None = None
    """A finished stage 1 (stage1.safetensors) to start stage 2 from, for `stages: [2]`."""


class Stage2Section(Section):
    epochs: Count = 60
    """Epochs of PK batches. Published: 60 for the ViT, 120 for RN50."""
    lr: Positive = 5e-6
    """Adam's learning rate after warm-up. Published: 5e-6 for the ViT (VehicleID 5e-5), 3.5e-4 for RN50."""
    weight_decay: NonNegative = 1e-4
    """L2 decay of all parameters, part of Adam's gradient (not AdamW). Published: 1e-4 for the ViT, 5e-4 for RN50."""
    bias_lr_factor: Positive = 2.0
    """Parameters with "bias" in their name take this multiple of `lr`. Published: 2."""
    identities: Count = 16
    """P: identities in one global batch, over all workers."""
    images_per_identity: Annotated[int, Field(ge=2)] = 4
    """K. At least 2: the triplet loss needs a positive pair inside the batch."""
    warmup_epochs: Whole = 10
    """Epochs of linear warm-up; 0: none."""
    warmup_factor: Fraction = 0.1
    """Part of `lr` that warm-up begins with, at epoch 0. Published: 0.1 for the ViT, 0.01 for RN50."""
    milestones: tuple[Count, ...] = (30, 50)
    """Epochs from which on the learning rate is `gamma` times as high. Published: 30, 50 for the ViT, 40, 70 for
    RN50."""
    gamma: Positive = 0.1
    """Factor on the learning rate at each milestone."""
    id_weight: NonNegative = 0.25
    """Weight of the identity loss (Eq. 6), cross-entropy summed over both classifiers. Published: 0.25 for the ViT, 1
    for RN50 and for all baselines."""
    triplet_weight: NonNegative = 1.0
    """Weight of the triplet loss (Eq. 7), batch-hard, summed over the levels of features."""
    text_weight: NonNegative = 1.0
    """Weight of the text loss (Eq. 8), which `text_loss` chooses."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that identity loss and i2tce spread over all identities. Published: 0.1; 0 for VehicleID with RN50
    and in its ViT baseline."""
    text_loss: TextLoss = "i2tce"
    """Image-to-text losses of stage 2 (Table 6)."""
    triplet_levels: Literal[2, 3] = 3
    """3, or 2 without the earlier layer (Table 9)."""
    margin: NonNegative = 0.3
    """Euclidean distance by which the nearest other identity has to be farther than the farthest image of its own
    (Eq. 7)."""


class AugmentSection(Section):
    flip: Fraction = 0.5
    """Probability of a mirror image."""
    pad: Whole = 10
    """Pixels of black on each side before the random crop."""
    erase: Fraction = 0.5
    """Probability of random erasing."""


class TrainSection(Section):
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """bf16: autocast around the encoders; parameters, moments and losses stay float32. float32: all of it, and without
    TF32. auto: what a run was begun with, or weights were trained with; else bf16 on GPUs that have it, float32
    elsewhere. Published: fp16 autocast."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the encoder with static shapes. auto: where it has been measured to pay, on no device so far
    (`cluster/ranks/arithmetic.py`)."""
    micro_batch: Count | None = None
    """Images that a worker's encoder takes at a time in stage 2, for global batches larger than memory: losses and
    gradients stay those of the whole batch, at the cost of a second forward pass. null: all at once. For a ViT only."""
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO stage. GPUs exchange gradients beside the backward pass in 1 and 2, after it in 0. 3 is not
    offered: a model of 150 million parameters never needs it."""


class EvalSection(Section):
    every_epochs: Whole = 0
    """Also evaluate after every n-th epoch of stage 2; 0: only before training and at the end."""
    descriptor: tuple[FeatureName, ...] = ("img", "proj")
    """Features concatenated for retrieval (Table 11)."""
    flip: bool = False
    """An image's descriptor is the mean of its features and its mirror image's, at twice the cost."""
    rule: Rule = "camera"
    """Gallery images of the query's identity that do not count: same camera, none, or same camera and time."""
    batch: Count = 128
    """Images per worker and forward pass; on a CPU each thread takes 16 of them at a time."""
    draws: Count = 10
    """Random galleries of the VehicleID protocol."""
    rerank: tuple[Count, Count, Fraction] | None = None
    """k-reciprocal re-ranking as [k1, k2, lambda]; null: off."""


class CheckpointSection(Section):
    every_steps: Whole = 0
    """Write a checkpoint after every n-th step as well; 0: only at the end of epochs."""
    every_minutes: NonNegative = 10.0
    """Write a checkpoint when the last one is older than this; 0: never for this reason."""
    every_epochs: Whole = 1
    """Write a checkpoint after every n-th epoch; 0: only after evaluated epochs and a stage's last."""
    keep: Count = 2
    """Newest complete checkpoints kept, beside the best by mAP."""


class Elastic(Section):
    min: Count
    """Fewest workers that the run goes on with."""
    max: Count
    """Most workers; it grows to them again when nodes come back."""


class ClusterSection(Section):
    launcher: Literal["ray", "torchrun", "local"] = "ray"
    """What places the workers: Ray Train (on the cluster of RAY_ADDRESS, else on this machine), torchrun, or local,
    where this process is the only one."""
    workers: Count | Elastic = 1
    """Number of workers, or {min, max} to go on with fewer and grow again. Ignored by torchrun and local."""
    timeout_s: Annotated[float, Field(gt=0, le=10_000_000)] = 120.0
    """A collective that takes longer is a failure."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = None
    """null: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: Count | None = None
    """null: one for the worker and one for each loader, as far as the cluster has them; without GPUs an equal share."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy: workers on as few nodes as possible or spread over many; STRICT: on one node only, or
    never two on a node."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts by Ray Train after a lost worker or node; -1: without limit."""

    @property
    def worker_range(self) -> tuple[int, int]:
        if isinstance(self.workers, Elastic):
            return self.workers.min, self.workers.max
        return self.workers, self.workers


class Config(Section):
    run: RunSection = RunSection()
    """Where a run lives, its seed, and from where it goes on."""
    data: DataSection
    """The packed dataset, and how it is read."""
    model: ModelSection = ModelSection()
    """The network, its first weights and its input."""
    method: Literal["two_stage", "one_stage", "baseline"] = "two_stage"
    """two_stage as published, one_stage (Table 5), or baseline: stage 2 alone without text (Table 4)."""
    stages: tuple[Literal[1, 2], ...] = (1, 2)
    """Stages to train: [1, 2]; [1], the prompts alone; or [2], from the prompts of stage1.result or of a checkpoint."""
    stage1: Stage1Section = Stage1Section()
    """Learning the prompt tokens, encoders frozen (Eq. 5)."""
    stage2: Stage2Section = Stage2Section()
    """Training the image encoder against the prompts' text features (Eq. 9)."""
    augment: AugmentSection = AugmentSection()
    """What happens to the training images of stage 2, on the workers' device."""
    train: TrainSection = TrainSection()
    """How steps are computed."""
    eval: EvalSection = EvalSection()
    """Descriptors and the protocol of evaluation."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When checkpoints are written, and which are kept."""
    cluster: ClusterSection = ClusterSection()
    """Workers: how many, where, and what becomes of failures."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        checks = (self._stage_faults, self._evaluation_faults, self._batch_faults, self._cluster_faults)
        if faults := [fault for check in checks for fault in check()]:
            raise ValueError("\n".join(faults))
        return self

    def _stage_faults(self) -> Iterator[str]:
        if self.stages not in ((1,), (2,), (1, 2)):
            yield f"stages: {list(self.stages)} is none of [1], [2], [1, 2]"
        if self.method != "two_stage" and self.stages != (2,):
            yield f"stages: method {self.method} has stage 2 alone: set stages=[2]"
        if self.method == "baseline" and self.stage2.text_loss != "none":
            yield f"stage2.text_loss: {self.stage2.text_loss} needs text, which method baseline has not: set it to none"
        if self.method == "two_stage" and self.stages == (2,) and not (self.stage1.result or self.starts_from_a_file):
            yield (
                "stage1.result: not given, but stages [2] starts from it: name a stage1.safetensors, "
                "or a checkpoint with prompts as model.pretrained"
            )
        if self.method == "one_stage" and self.stage2.text_loss not in ("i2tce", "i2t+t2i"):
            yield (
                f"stage2.text_loss: {self.stage2.text_loss} is not for method one_stage, whose text loss is i2t+t2i: "
                "set it to that"
            )
        if self.method != "two_stage" and self.stage1.features != "instance":
            yield f"stage1.features: {self.stage1.features} has no use in method {self.method}: set it to instance"
        if self.method != "two_stage" and self.stage1.result:
            yield f"stage1.result: {self.stage1.result} has no use in method {self.method}: leave it out"
        if self.stage1.result and 1 in self.stages:
            yield f"stage1.result: {self.stage1.result} would be overwritten by stage 1: set stages=[2]"
        if self.stage1.warmup_epochs and self.stage1.min_lr > self.stage1.lr:
            yield f"stage1.min_lr: {self.stage1.min_lr} is above stage1.lr {self.stage1.lr}"

    def _evaluation_faults(self) -> Iterator[str]:
        chosen = self.eval.descriptor
        if not chosen or len(set(chosen)) < len(chosen):
            yield f"eval.descriptor: {list(chosen)} has to name at least one of pre, img, proj, and none of them twice"

    def _batch_faults(self) -> Iterator[str]:
        identities, per = self.stage2.identities, self.stage2.images_per_identity
        low, high = self.cluster.worker_range
        if self.cluster.launcher == "ray" and not self.allowed_workers() and low <= high:
            yield (
                f"cluster.workers: {low if low == high else f'{low} to {high}'} does not divide the batch of "
                f"{identities} identities x {per} images into whole identities (stage2.identities); possible: "
                f"{self.possible_workers()}"
            )
        if self.data.locality == "node" and identities % self.data.virtual_nodes:
            yield f"data.virtual_nodes: {self.data.virtual_nodes} does not divide stage2.identities {identities}"

    def _cluster_faults(self) -> Iterator[str]:
        low, high = self.cluster.worker_range
        if low > high:
            yield f"cluster.workers: min {low} is above max {high}"

    @property
    def starts_from_a_file(self) -> bool:
        """Whether model.pretrained is a file or a run, and not the tag of weights that open_clip fetches."""
        return str(self.model.pretrained).endswith(WEIGHT_SUFFIXES) or "/" in str(self.model.pretrained)

    @property
    def batch_images(self) -> int:
        """Images in one global PK batch, P x K."""
        return self.stage2.identities * self.stage2.images_per_identity

    def allowed_workers(self) -> list[int]:
        """Numbers of workers in `cluster.workers` that divide the PK batch by whole identities."""
        low, high = self.cluster.worker_range
        if 2 not in self.stages:
            return list(range(low, high + 1))
        return [n for n in self.possible_workers() if low <= n <= high]

    def possible_workers(self) -> list[int]:
        """Every number of workers that divides the PK batch by whole identities, ascending."""
        return [n for n in range(1, self.stage2.identities + 1) if self.stage2.identities % n == 0]


def settled_forms(config: Config) -> list[Config]:
    """What a run's settings may be when nothing is left to its device: one, or one for each precision."""
    if config.train.precision != AUTO:
        return [config]
    trains = [config.train.model_copy(update={"precision": precision}) for precision in ("float32", "bf16")]
    return [config.model_copy(update={"train": train}) for train in trains]


STAGE1_EPOCHS = "stage1.epochs"
"""Bends stage 1's learning rate from its first epoch on, and changes nothing when stage 1 is done."""
MAY_CHANGE = (
    "run.dir",
    "run.resume",
    "data.shards",
    "data.on_error",
    "data.skip_limit",
    "data.cache_dir",
    "data.cache_gb",
    "data.loaders",
    "model.pretrained",
    "stage2.epochs",
    "train.compile",
    "train.micro_batch",
    "train.zero_stage",
    "eval",
    "checkpoint",
    "cluster",
)
"""Keys and sections that may change between a run and its continuation: none of them changes what is computed."""


def results_settings(config: Config) -> dict[str, Any]:
    """The settings that decide a run's results, flat: {"stage2.lr": 5e-6, ...}. Epochs of stage 2 may grow later."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{k}.") for k in MAY_CHANGE)}


def settings_hash(settings: dict[str, Any]) -> str:
    """The first 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"stage2": {"lr": 5e-6}} as {"stage2.lr": 5e-6}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
