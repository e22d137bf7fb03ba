"""The paper's pictures of a trained model: t-SNE, relevance maps, ranked lists (Figures 1, 3 and 4).

    inference + shards ──▶ [figures] ──▶ tsne.png, relevance.png, ranked.png

Identities and queries are taken at even distances, so the same ones appear for every model of a dataset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from clipreid.augment import normalise
from clipreid.identity_table import IdentityTable
from clipreid.model.prompts import PromptedText
from clipreid.model.relevance import relevance_maps
from clipreid.retrieval.metrics import retrieve
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rules import Rule
from clipreid.retrieval.vehicleid import draw_gallery, largest_list
from clipreid.weights.card import ModelCard
from clipreid.weights.file import load_text
from clipreid.weights.initial import build_models
from clipreid.weights.official import holds_prompts, official_shapes
from clipreid.weights.pretrained import is_official, read_state_dict
from clipreid.weights.tables import CLASSIFIER_PROJ, TOKENS, load_table
from cluster.errors import ConfigError
from cluster.evaluation.inference import Inference
from cluster.evaluation.metrics import ShowProgress, labels_of
from cluster.settings.config import Config
from cluster.settings.model_spec import model_spec
from shards.loading.decode import pick_images
from shards.loading.index import ShardIndex, SplitIndex
from shards.storage import write_atomic

TSNE_IDENTITIES, TSNE_IMAGES = 10, 40
RELEVANCE_IMAGES = 12
QUERIES, NEAREST = 8, 10
RIGHT, WRONG = "#2a9d3a", "#d62828"
INCH = 1.3
"""Height of an image in a figure."""
SplitRows = tuple[str, np.ndarray]
"""A split, and row numbers in it."""


@dataclass(frozen=True)
class Subject:
    """What the figures show: a model with its weights, on a dataset."""

    inference: Inference
    index: ShardIndex
    text: PromptedText | None
    """None where no prompts were learned, as by the baseline or in CLIP's own weights, or those of other identities."""
    tokens: IdentityTable | None
    """Of the prompts, with `text`."""
    classifier: IdentityTable | None
    """Of the projected feature; None where it is of other identities than the dataset's."""
    show: ShowProgress

    @classmethod
    def of(cls, config: Config, path: Path, card: ModelCard | None, index: ShardIndex, show: ShowProgress) -> "Subject":
        """Raises ModelError where the weights of the file do not fit."""
        inference, text, tokens, classifier = Inference(config, path, card, index), None, None, None
        here = index.split("train").num_identities if "train" in index.splits else 0
        if card:
            text, tokens, classifier = load_text(path), load_table(path, TOKENS), load_table(path, CLASSIFIER_PROJ)
        elif here and _may_be_of(path, here):
            _, text, tables = build_models(model_spec(config, index), str(path), config.run.seed)
            tokens, classifier = tables.tokens, tables.classifier_proj
            if not holds_prompts(path):
                text = None
        if classifier is None or classifier.num_identities != here:
            text = tokens = classifier = None
        if config.method == "baseline":
            text = None
        return cls(inference, index, text and text.to(inference.team.device).eval(), tokens, classifier, show)

    @property
    def train(self) -> SplitIndex:
        if "train" in self.index.splits:
            return self.index.split("train")
        raise ConfigError(
            f"data.shards={self.index.url}: has no split train, which this figure shows; draw --figure ranked"
        )

    @torch.no_grad()
    def text_features(self, labels: np.ndarray) -> Tensor | None:
        """float32 [n, D] of these training identities."""
        if self.text is None or self.tokens is None:
            return None
        return self.text(self.tokens.block[labels].to(self.inference.team.device)).float().cpu()

    def pixels(self, images: Tensor) -> Tensor:
        """float32 [n, 3, H, W] as the encoder takes them."""
        data = self.inference.config.data
        return normalise(images.to(self.inference.team.device), data.pixel_mean, data.pixel_std)


def _may_be_of(path: Path, identities: int) -> bool:
    """Whether weights of others are of so many training identities, or of none: CLIP's own."""
    state = read_state_dict(path)
    return not is_official(state) or official_shapes(state, str(path)).identities == identities


def draw_figure(name: str, subject: Subject, path: Path) -> None:
    """Draw one of FIGURES into a PNG file.

    Raises:
        ConfigError: the dataset has no split for it.
        DataError: an image cannot be read.
    """
    with write_atomic(str(path)) as file:
        FIGURES[name](subject).savefig(file, format="png", dpi=150, bbox_inches="tight")


def tsne(subject: Subject) -> Figure:
    """Figure 1: image features (dots) and text features (pentagons) of training identities, a colour each."""
    from sklearn.manifold import TSNE

    train = subject.train
    labels = _spread(train.num_identities, TSNE_IDENTITIES)
    rows = [np.flatnonzero(train.labels == label)[:TSNE_IMAGES] for label in labels]
    owner = np.repeat(np.arange(len(labels)), [len(own) for own in rows])
    points = _projected(subject, np.concatenate(rows))
    images = len(points)
    if (texts := subject.text_features(labels)) is not None:
        points = torch.cat([F.normalize(points), F.normalize(texts)])
        owner = np.concatenate([owner, np.arange(len(labels))])
    perplexity = min(30.0, (len(points) - 1) / 3)
    embedding = TSNE(metric="cosine", init="random", random_state=0, perplexity=perplexity)
    x, y = embedding.fit_transform(F.normalize(points).numpy()).T

    figure = Figure(figsize=(6, 6))
    axes = figure.subplots()
    colours = colormaps["tab10"](owner)
    axes.scatter(x[:images], y[:images], c=colours[:images], s=14, label="images")
    if texts is not None:
        x, y, colours = x[images:], y[images:], colours[images:]
        axes.scatter(x, y, c=colours, s=150, marker="p", edgecolors="black", label="texts")
    axes.set(xticks=[], yticks=[], title=f"{len(labels)} training identities of {subject.index.name}")
    axes.legend()
    return figure


def relevance(subject: Subject) -> Figure:
    """Figure 3: what in an image speaks for its identity, by its text feature (without texts, by its classifier)."""
    train = subject.train
    if subject.classifier is None:
        raise ConfigError(
            f"data.shards={subject.index.url}: the weights are of other training identities than it has, whose "
            "relevance this figure shows; give the dataset that they were trained on, or draw --figure tsne ranked"
        )
    labels = _spread(train.num_identities, RELEVANCE_IMAGES)
    rows = np.array([np.flatnonzero(train.labels == label)[0] for label in labels])
    images = pick_images(subject.index, "train", rows.tolist(), subject.inference.config.model.image_size)
    targets = subject.text_features(labels)
    if targets is None:
        assert subject.classifier is not None, "made or read wherever there is a training split"
        targets = subject.classifier.block.detach()[labels]
    pixels = subject.pixels(images)
    maps = relevance_maps(subject.inference.model.image_encoder, pixels, targets.to(pixels.device)).cpu()
    maps = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    figure, grid = _canvas(rows=2, columns=len(labels), image_size=subject.inference.config.model.image_size)
    heat = torch.from_numpy(colormaps["turbo"](maps.numpy())[..., :3]).float()
    for column, (image, colour, label) in enumerate(zip(images, heat, labels, strict=True)):
        pixels = image.permute(1, 2, 0)
        _show(grid[0, column], pixels, train.label_names[label])
        _show(grid[1, column], 0.5 * pixels / 255 + 0.5 * colour, "")
    return figure


def ranked_lists(subject: Subject) -> Figure:
    """Figure 4: queries and their nearest gallery images, framed green where the identity is right, red where not."""
    inference, index = subject.inference, subject.index
    (query_split, query_rows), (gallery_split, gallery_rows) = _query_and_gallery(inference.config, index)
    query_rows = query_rows[_spread(len(query_rows), QUERIES)]
    encoded = {
        name: inference.extract_split(index, name, subject.show)["features"]
        for name in sorted({query_split, gallery_split})
    }
    rule: Rule = "none" if query_split == "test" else inference.config.eval.rule
    query, gallery = _labels(index, query_split, query_rows, rule), _labels(index, gallery_split, gallery_rows, rule)
    queries, rows = torch.from_numpy(encoded[query_split][query_rows]), encoded[gallery_split][gallery_rows]
    nearest = retrieve(queries, query, rows, gallery, rule=rule, top_k=NEAREST).nearest
    assert nearest is not None, "asked for by top_k"

    size = inference.config.model.image_size
    figure, grid = _canvas(rows=len(query_rows), columns=1 + NEAREST, image_size=size)
    for line, row in enumerate(query_rows):
        own = pick_images(index, query_split, [int(row)], size)[0]
        _show(grid[line, 0], own.permute(1, 2, 0), "query" if line == 0 else "")
        found = nearest.rows[line][nearest.rows[line] >= 0]
        images = pick_images(index, gallery_split, gallery_rows[found].tolist(), size)
        for column, (other, image) in enumerate(zip(found, images, strict=True), start=1):
            right = query.known[line] and gallery.identities[other] == query.identities[line]
            _show(grid[line, column], image.permute(1, 2, 0), str(column) if line == 0 else "")
            for spine in grid[line, column].spines.values():
                spine.set(visible=True, color=RIGHT if right else WRONG, linewidth=3)
    return figure


FIGURES: dict[str, Callable[[Subject], Figure]] = {
    "tsne": tsne,
    "relevance": relevance,
    "ranked": ranked_lists,
}


def _spread(total: int, most: int) -> np.ndarray:
    """Up to `most` numbers below `total`, at even distances. int64."""
    return np.arange(min(most, total)) * total // min(most, total)


@torch.no_grad()
def _projected(subject: Subject, rows: np.ndarray) -> Tensor:
    """Projected features of training images without side information, as stage 1 has them. float32 [n, D]."""
    size, batch = subject.inference.config.model.image_size, subject.inference.config.eval.batch
    parts = []
    with subject.show("encode train") as progress:
        for start in range(0, len(rows), batch):
            images = pick_images(subject.index, "train", rows[start : start + batch].tolist(), size)
            parts.append(subject.inference.model.features(subject.pixels(images)).proj.float().cpu())
            progress(start + len(images), len(rows))
    return torch.cat(parts)


def _query_and_gallery(config: Config, index: ShardIndex) -> tuple[SplitRows, SplitRows]:
    """The queries and the gallery; of VehicleID those of the largest list's first draw."""
    if "test" not in index.splits:
        return ("query", np.arange(len(index.split("query")))), ("gallery", np.arange(len(index.split("gallery"))))
    test = index.split("test")
    rows = largest_list(test.identity_codes, test.lists)
    gallery = draw_gallery(test.identity_codes[rows], config.run.seed, 0)
    return ("test", np.delete(rows, gallery)), ("test", rows[gallery])


def _labels(index: ShardIndex, split: str, rows: np.ndarray, rule: Rule) -> Labels:
    whole = labels_of(index.split(split), rule)
    cameras, times = (None if column is None else column[rows] for column in (whole.cameras, whole.times))
    return Labels(whole.identities[rows], cameras, times)


def _canvas(rows: int, columns: int, image_size: tuple[int, int]) -> tuple[Figure, np.ndarray]:
    """A figure, and its empty axes [rows, columns]."""
    height, width = image_size
    figure = Figure(figsize=(INCH * columns * width / height, INCH * rows))
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, grid


def _show(axes: Axes, pixels: Tensor, title: str) -> None:
    axes.imshow(pixels.numpy())
    axes.set_title(title, fontsize=7)
