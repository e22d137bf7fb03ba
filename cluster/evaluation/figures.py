"""The paper's pictures of a trained model: t-SNE, relevance maps, ranked lists (Figures 1, 3 and 4).

    weights applied (apply) + shards ──▶ [figures] ──▶ tsne.png, relevance.png, ranked.png

Identities and queries are taken at even distances, so the same ones appear for every model of a dataset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from clipreid.augment import normalise
from clipreid.model.prompts import PromptedText
from clipreid.model.relevance import relevance_maps
from clipreid.retrieval.metrics import retrieve
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.vehicleid import LISTS, draw_gallery, list_members
from clipreid.weights.card import ModelCard
from clipreid.weights.file import load_text
from clipreid.weights.initial import build_models
from clipreid.weights.pretrained import is_official, read_state_dict
from cluster.errors import ConfigError
from cluster.evaluation.evaluate import labels_of
from cluster.evaluation.inference import Applied, Progress
from cluster.settings.config import Config
from cluster.settings.model_spec import model_spec
from shards.loading.index import ShardIndex, SplitIndex
from shards.loading.pick import pick_images
from shards.storage import write_atomic

TSNE_IDENTITIES, TSNE_IMAGES = 10, 40
RELEVANCE_IMAGES = 12
QUERIES, NEAREST = 8, 10
RIGHT, WRONG = "#2a9d3a", "#d62828"
INCH = 1.3
"""Height of an image in a figure."""


@dataclass(frozen=True)
class Subject:
    """What the figures show: a model with its weights, on a dataset."""

    applied: Applied
    index: ShardIndex
    text: PromptedText | None
    """None where no prompts were learned: the baseline, and CLIP's own weights."""
    progress: Progress

    @classmethod
    def of(cls, config: Config, path: Path, card: ModelCard | None, index: ShardIndex, progress: Progress) -> "Subject":
        """Raises ModelError where the weights of the file do not fit."""
        applied, text = Applied(config, path, card, index), None
        if config.method != "baseline" and card:
            text = load_text(path)
        elif config.method != "baseline" and "train" in index.splits and is_official(read_state_dict(path)):
            text = build_models(model_spec(config, index), str(path), config.run.seed)[1]
        return cls(applied, index, text and text.to(applied.team.device).eval(), progress)

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
        if self.text is None:
            return None
        return self.text(torch.from_numpy(labels).to(self.applied.team.device)).float().cpu()

    def pixels(self, images: Tensor) -> Tensor:
        """float32 [n, 3, H, W] as the encoder takes them."""
        data = self.applied.config.data
        return normalise(images.to(self.applied.team.device), data.pixel_mean, data.pixel_std)


def draw_figure(name: str, subject: Subject, path: Path) -> None:
    """Draw one of FIGURES into a PNG file.

    Raises ConfigError where the dataset has no split for it, DataError for an image that cannot be read.
    """
    with write_atomic(str(path)) as file:
        FIGURES[name](subject).savefig(file, format="png", dpi=150, bbox_inches="tight")


def tsne(subject: Subject) -> Figure:
    """Figure 1: image features (dots) and text features (pentagons) of training identities, a colour each."""
    from sklearn.manifold import TSNE

    train = subject.train
    labels = _spread(train.num_identities, TSNE_IDENTITIES)
    rows = [np.flatnonzero(train.labels == label)[:TSNE_IMAGES] for label in labels]
    owner = np.repeat(np.arange(len(labels)), [len(part) for part in rows])
    points = _projected(subject, np.concatenate(rows))
    images = len(points)
    if (texts := subject.text_features(labels)) is not None:
        points = torch.cat([F.normalize(points), F.normalize(texts)])
        owner = np.concatenate([owner, np.arange(len(labels))])
    points = F.normalize(points).numpy()
    perplexity = min(30.0, (len(points) - 1) / 3)
    places = TSNE(metric="cosine", init="random", random_state=0, perplexity=perplexity).fit_transform(points)

    figure = Figure(figsize=(6, 6))
    axes = figure.subplots()
    colours = colormaps["tab10"](owner)
    axes.scatter(*places[:images].T, c=colours[:images], s=14, label="images")
    if texts is not None:
        axes.scatter(*places[images:].T, c=colours[images:], s=150, marker="p", edgecolors="black", label="texts")
    axes.set(xticks=[], yticks=[], title=f"{len(labels)} training identities of {subject.index.name}")
    axes.legend()
    return figure


def relevance(subject: Subject) -> Figure:
    """Figure 3: what in an image speaks for its identity, by its text feature (without texts, by its classifier)."""
    train, model = subject.train, subject.applied.model
    labels = _spread(train.num_identities, RELEVANCE_IMAGES)
    rows = np.array([np.flatnonzero(train.labels == label)[0] for label in labels])
    images = pick_images(subject.index, "train", rows.tolist(), subject.applied.config.model.image_size)
    targets = subject.text_features(labels)
    if targets is None:
        targets = model.classifier_proj.weight.detach()[labels]
    pixels = subject.pixels(images)
    maps = relevance_maps(model.image_encoder, pixels, targets.to(pixels.device)).cpu()
    maps = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    figure = _canvas(rows=2, columns=len(labels), image_size=images.shape[2:])
    heat = torch.from_numpy(colormaps["turbo"](maps.numpy())[..., :3]).float()
    for column, (image, colour, label) in enumerate(zip(images, heat, labels, strict=True)):
        pixels = image.permute(1, 2, 0)
        _show(figure, 0, column, pixels, train.label_names[label])
        _show(figure, 1, column, 0.5 * pixels / 255 + 0.5 * colour, "")
    return figure


def ranked(subject: Subject) -> Figure:
    """Figure 4: queries and their nearest gallery images, framed green where the identity is right, red where not."""
    applied, index = subject.applied, subject.index
    (query_split, query_rows), (gallery_split, gallery_rows) = _query_and_gallery(applied.config, index)
    query_rows = query_rows[_spread(len(query_rows), QUERIES)]
    encoded = {
        name: applied.extract_split(index, name, subject.progress)["features"]
        for name in sorted({query_split, gallery_split})
    }
    query, gallery = _labels(index, query_split, query_rows), _labels(index, gallery_split, gallery_rows)
    found = retrieve(
        torch.from_numpy(encoded[query_split][query_rows]), query, encoded[gallery_split][gallery_rows], gallery,
        rule="none" if query_split == "test" else applied.config.eval.rule, top_k=NEAREST,
    ).nearest.rows  # fmt: skip

    size = applied.config.model.image_size
    figure = _canvas(rows=len(query_rows), columns=1 + NEAREST, image_size=size)
    for line, row in enumerate(query_rows):
        own = pick_images(index, query_split, [int(row)], size)[0]
        _show(figure, line, 0, own.permute(1, 2, 0), "query" if line == 0 else "")
        places = found[line][found[line] >= 0]
        images = pick_images(index, gallery_split, gallery_rows[places].tolist(), size)
        for column, (place, image) in enumerate(zip(places, images, strict=True), start=1):
            right = query.known[line] and gallery.identities[place] == query.identities[line]
            axes = _show(figure, line, column, image.permute(1, 2, 0), str(column) if line == 0 else "")
            for spine in axes.spines.values():
                spine.set(visible=True, color=RIGHT if right else WRONG, linewidth=3)
    return figure


FIGURES: dict[str, Callable[[Subject], Figure]] = {
    "tsne": tsne,
    "relevance": relevance,
    "ranked": ranked,
}


def _spread(total: int, wanted: int) -> np.ndarray:
    """Up to `wanted` numbers below `total`, at even distances. int64."""
    return np.arange(min(wanted, total)) * total // min(wanted, total)


@torch.no_grad()
def _projected(subject: Subject, rows: np.ndarray) -> Tensor:
    """Projected features of training images without side information, as stage 1 has them. float32 [n, D]."""
    size, batch = subject.applied.config.model.image_size, subject.applied.config.eval.batch
    parts = []
    with subject.progress("encode train") as done:
        for start in range(0, len(rows), batch):
            images = pick_images(subject.index, "train", rows[start : start + batch].tolist(), size)
            parts.append(subject.applied.model.features(subject.pixels(images)).proj.float().cpu())
            done(start + len(images), len(rows))
    return torch.cat(parts)


def _query_and_gallery(config: Config, index: ShardIndex):
    """(split, row numbers) of the queries and of the gallery; of VehicleID those of the largest list's first draw."""
    if "test" not in index.splits:
        return ("query", np.arange(len(index.split("query")))), ("gallery", np.arange(len(index.split("gallery"))))
    test = index.split("test")
    for name in reversed(LISTS.values()):
        rows, _ = list_members(test.identity_codes, test.lists, name)
        if len(rows):
            gallery = draw_gallery(test.identity_codes[rows], config.run.seed, 0)
            return ("test", np.delete(rows, gallery)), ("test", rows[gallery])
    raise ConfigError(
        f"data.shards={index.url}: no image of split test that has an identity is in a test list; pack it with both"
    )


def _labels(index: ShardIndex, split: str, rows: np.ndarray) -> Labels:
    whole = labels_of(index.split(split))
    return Labels(whole.identities[rows], whole.cameras[rows], whole.times[rows])


def _canvas(rows: int, columns: int, image_size: tuple[int, int]) -> Figure:
    height, width = image_size
    figure = Figure(figsize=(INCH * columns * width / height, INCH * rows))
    figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _show(figure: Figure, row: int, column: int, pixels: Tensor, title: str):
    columns = figure.axes[0].get_gridspec().ncols
    axes = figure.axes[row * columns + column]
    axes.imshow(pixels.numpy())
    axes.set_title(title, fontsize=7)
    return axes
