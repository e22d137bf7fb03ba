"""A comparison as a page: its tables, and the queries that changed most with their nearest images, before and after.

    comparison, query results + shards ──▶ [page] ──▶ one HTML file

Pictures lie in the file itself, and it asks nothing of anywhere: its policy forbids it. Right and wrong are told by a
sign and the kind of line as well as by colour.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from jinja2 import Environment
from PIL import Image

from cluster.comparison.comparison import Change, Comparison
from cluster.comparison.query_results import QueryResults
from cluster.comparison.tables import difference_cell, figure_cell, sentence
from shards.errors import masked
from shards.loading.decode import pick_images
from shards.loading.index import SplitIndex

QUALITY = 85
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 0.5em 0 1.5em } caption { text-align: left; color: #555 }
th, td { border-bottom: 1px solid #ccc; padding: 0.25em 0.8em; text-align: left; white-space: pre-line;
  vertical-align: top; font-variant-numeric: tabular-nums }
.list { display: flex; flex-wrap: wrap; gap: 6px; margin: 0.3em 0 } .list > b { width: 9em; overflow-wrap: anywhere }
figure { margin: 0; text-align: center; font-size: 11px; color: #333 }
img { height: 96px; display: block; border: 4px solid #888 }
.right img { border-color: #0072b2 } .wrong img { border-color: #d55e00; border-style: dashed }
section { break-inside: avoid; border-top: 1px solid #ccc; padding: 0.6em 0 }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ sentence }}. Every interval is for itself: of twenty differences that are none, one is expected to look like
one.</p>
<table><caption>figures, %</caption>
<tr><th>run</th>{% for name in figures[0][1] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for run, row in figures %}<tr><th>{{ run }}</th>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<table><caption>less those of {{ figures[0][0] }}; then in how many resamples the difference has that sign</caption>
<tr><th>run</th>{% for name in figures[0][1] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for run, row in differences %}<tr><th>{{ run }}</th>
{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if settings %}<table><caption>settings that differ</caption>
<tr><th>setting</th>{% for run, row in figures %}<th>{{ run }}</th>{% endfor %}</tr>
{% for key, row in settings.items() %}<tr><th>{{ key }}</th>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% else %}<p>No setting differs.</p>{% endif %}
{% for part in parts %}
<h2>Queries that changed most from {{ figures[0][0] }} to {{ part.run }}</h2>
{% if part.queries %}<p>✓ and a solid line: the query's identity; ✗ and a dashed line: another. Below: the distance.</p>
{% else %}<p>None changed.</p>{% endif %}
{% for query in part.queries %}<section>
<div class="list"><b>{{ query.key }}</b>{{ shown(query.picture) }}<span>identity {{ query.identity }}, {{ query.camera
}}<br>AP {{ query.AP[0] }} → {{ query.AP[1] }} %<br>rank of the first match {{ query.first_rank[0] }} → {{
query.first_rank[1] }}</span></div>
{% for run, pictures in query.lists %}<div class="list"><b>{{ run }}</b>
{% for picture in pictures %}{{ shown(picture) }}{% endfor %}</div>
{% endfor %}</section>
{% endfor %}{% endfor %}
</body></html>
"""
PICTURE = """{% macro shown(picture) %}<figure class="{{ picture.kind }}" title="{{ picture.key }}">
<img src="data:image/jpeg;base64,{{ picture.jpeg }}" alt="{{ picture.key }}">{{ picture.caption }}</figure>{% endmacro
%}"""


@dataclass(frozen=True)
class Picture:
    key: str
    jpeg: str
    """In base64."""
    kind: str = ""
    """Class of the style sheet: right, wrong or none."""
    caption: str = ""


Pair = tuple[str, QueryResults, Sequence[Change]]
"""A run's name, its results, and the queries that it ranks otherwise than the first run."""


def comparison_page(
    comparison: Comparison, first: QueryResults, others: Sequence[Pair], image_size: tuple[int, int]
) -> bytes:
    """The page. first, others: with their nearest images. image_size: (H, W) of the pictures, pixels.

    Raises DataError for a picture that cannot be read.
    """
    album = _Album(image_size)
    parts = [
        {"run": name, "queries": [_query(album, comparison.names[0], first, name, results, each) for each in changes]}
        for name, results, changes in others
    ]
    rows = [{name: figure_cell(each) for name, each in figures.items()} for figures in comparison.figures]
    changed = [{name: difference_cell(each) for name, each in row.items()} for row in comparison.differences]
    names = comparison.names
    facts = {
        "title": f"{', '.join(names)} on {first.query.index.name}",
        "sentence": sentence(comparison),
        "figures": list(zip(names, rows, strict=True)),
        "differences": list(zip(names[1:], changed, strict=True)),
        "settings": comparison.settings,
        "parts": parts,
    }
    template = Environment(autoescape=True).from_string(PICTURE + TEMPLATE)
    return masked(template.render(facts)).encode()


def _query(
    album: "_Album", first_name: str, first: QueryResults, name: str, results: QueryResults, change: Change
) -> dict[str, Any]:
    row = int(results.rows[change.number])
    camera = int(results.query.cameras[row])
    lists = [(run, _ranked(album, each, change.number)) for run, each in ((first_name, first), (name, results))]
    return {
        "key": results.query.key(row),
        "identity": results.query.identity_of(row),
        "camera": f"camera {camera}" if camera >= 0 else "camera unknown",
        "picture": album.picture(results.query, row),
        "AP": [f"{100 * AP:.1f}" for AP in change.AP],
        "first_rank": change.first_rank,
        "lists": lists,
    }


def _ranked(album: "_Album", results: QueryResults, number: int) -> list[Picture]:
    identity, pictures = results.identities[number], []
    for row, distance in zip(results.nearest[number].tolist(), results.distances[number].tolist(), strict=True):
        if row >= 0:
            kind, sign = ("right", "✓") if results.gallery.identity_codes[row] == identity else ("wrong", "✗")
            pictures.append(album.picture(results.gallery, row, kind, f"{sign} {distance:.3f}"))
    return pictures


class _Album:
    """Pictures out of the shards, as a model gets them, each read once."""

    def __init__(self, image_size: tuple[int, int]):
        """image_size: (H, W), pixels."""
        self.image_size = image_size
        self._read: dict[tuple[str, int], str] = {}

    def picture(self, split: SplitIndex, row: int, kind: str = "", caption: str = "") -> Picture:
        if (split.name, row) not in self._read:
            self._read[split.name, row] = self._jpeg(split, row)
        return Picture(split.key(row), self._read[split.name, row], kind, caption)

    def _jpeg(self, split: SplitIndex, row: int) -> str:
        pixels = pick_images(split.index, split.name, [row], self.image_size)[0].permute(1, 2, 0)
        file = BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=QUALITY)
        return b64encode(file.getvalue()).decode()
