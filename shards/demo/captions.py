"""What a person would say of one photo: the vehicle's looks, and what the moment adds, in varied words.

    looks, scene (Sight) ──▶ [captions] ──▶ demo dataset (captions.csv), training of the demo's CLIP

A caption names some of what was drawn, never anything else. It is a pure function of looks, sight and generator. Words
are those of the CLIP vocabulary, and no caption is longer than the 77 tokens that CLIP reads.
"""

import re
from collections.abc import Iterator

import numpy as np

from shards.demo.looks import ACCENTS, COLOURS, EMBLEMS, RGB, RIMS, SHAPES, Looks
from shards.demo.scene import Sight

DIRECTIONS = ("front", "rear", "left", "left front", "left rear", "right", "right front", "right rear")
"""By VeRi-776's number of the view."""
TEMPLATES = (
    "A photo of a {adjectives} {body}{marks}, {direction}{moment}.",
    "A photo of a {adjectives} {body}{marks}{moment}.",
    "A photo of a {adjectives} {marked}{body} vehicle.",
    "A photo of a {marked}{adjectives} vehicle.",
    "A photo of a {adjectives} {body} vehicle{marks}, {direction}.",
    "A {adjectives} {body}{marks}, {direction}{moment}.",
    "{Direction}: a {adjectives} {body}{marks}{moment}.",
    "A {adjectives} vehicle{marks}, a {body}, {direction}.",
)
TOLD = (0.0, 0.0, 0.4, 0.9)
"""How much of an identity's marks a caption tells. Where nearly all of them told all, with the colour, a CLIP told
pictures apart by those alone, and learned neither bodies nor directions."""
_WEATHER = {"shade": "half in the shade", "rain": "in the rain", "fog": "in fog", "clear": "on a clear day"}
_HIDDEN = {"pole": "behind a pole", "vehicle": "behind another vehicle", "leaves": "behind leaves"}
_DARK, _BRIGHT = 0.38, 0.55
"""Below and above which `Sight.light` is told, which a fifth of the photos is each."""
_MARKED = {
    "roof": "roofed",
    "skirt": "skirted",
    "stripe": "striped",
    "band": "banded",
    "emblem": "marked",
    "load": "loaded",
}
"""Words that put a mark before the noun, as the prompts of re-identification have all they say."""
_STRIPES = {
    "single": "a {} stripe along the middle",
    "twin": "twin {} stripes",
    "wide": "a wide {} stripe on top",
    "edges": "{} stripes along the edges",
}
_BANDS = {
    "low": "a low {} band around the sides",
    "middle": "a {} band around the sides",
    "wide": "a wide {} band around the sides",
    "rear": "{} rear quarters",
    "door": "{} doors",
}
_LOADS = {
    "bars": "{} roof bars",
    "box": "a {} roof box",
    "ladder": "a {} ladder on the roof",
    "kayak": "a {} kayak on the roof",
    "lights": "{} lights on the roof",
    "sign": "a {} sign on the roof",
    "luggage": "{} luggage on the roof",
    "cooler": "a {} cooler on the roof",
}
_PROPORTIONS = (("short", "long"), ("low", "tall"), ("narrow", "broad"))
_TRIFLES = ("{} rims of {} spokes", "a spare wheel", "a spoiler")
_LIGHTS = ("in dim light", "in bright light")
_CARGO = {"truck": "a {} cargo box", "pickup": "{} cargo"}


def describe(looks: Looks, sight: Sight, rng: np.random.Generator) -> str:
    """A caption; `rng` decides its template and what it leaves out."""
    told = rng.choice(TOLD)
    marks = [mark for mark in _marks(looks) if rng.random() < told]
    marks += [mark for mark in _trifles(looks) if rng.random() < told / 3]
    marks = [marks[place] for place in rng.permutation(len(marks))]
    proportions = [word for word in _proportions(looks) if rng.random() < 0.6 * told]
    colour = [looks.colour] if rng.random() < 0.6 else []
    direction = f"seen from the {DIRECTIONS[sight.view]}"
    moments = [moment for moment in _moments(sight) if rng.random() < 0.5]
    caption = TEMPLATES[rng.integers(len(TEMPLATES))].format(
        adjectives=" ".join([*proportions, *colour]),
        body=looks.shape,
        marked="".join(f"{word} " for word in _marked(looks) if rng.random() < told),
        marks=f" with {_listed(marks)}" if marks else "",
        direction=direction,
        Direction=direction.capitalize(),
        moment=f", {', '.join(moments)}" if moments else "",
    )
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", re.sub(" +", " ", caption))


def all_words() -> str:
    """Every word that a caption can have, once or more often."""
    tables = (_STRIPES, _BANDS, _LOADS, _CARGO, _MARKED, _WEATHER, _HIDDEN)
    names = (COLOURS, SHAPES, ACCENTS, RIMS, EMBLEMS, DIRECTIONS, *_PROPORTIONS, _TRIFLES, _LIGHTS)
    phrases = [
        *TEMPLATES,
        *(text for table in tables for text in table.values()),
        *(text for name in names for text in name),
    ]
    written = "seen from the, roof, lower body, on the doors, and with an 3 4 5 6 7"
    return re.sub(r"{\w*}", " ", f"{' '.join(phrases)} {written}")


def _marks(looks: Looks) -> Iterator[str]:
    """What tells identities of one colour and shape apart."""
    if looks.roof:
        yield f"a {_accent(looks.roof)} roof"
    if looks.skirt:
        yield f"a {_accent(looks.skirt)} lower body"
    for words, mark in ((_STRIPES, looks.stripe), (_BANDS, looks.band), (_LOADS, looks.load)):
        if mark:
            yield words[mark[0]].format(_accent(mark[1]))
    if looks.emblem:
        yield f"a {_accent(looks.emblem[1])} {looks.emblem[0]} on the doors"
    if looks.shape in _CARGO:
        yield _CARGO[looks.shape].format(_accent(looks.cargo))


def _marked(looks: Looks) -> Iterator[str]:
    for mark, word in _MARKED.items():
        if worn := getattr(looks, mark):
            yield f"{_accent(worn if mark in ('roof', 'skirt') else worn[1])} {word}"


def _trifles(looks: Looks) -> Iterator[str]:
    rims = next(name for name, rgb in RIMS.items() if rgb == looks.rim)
    yield _TRIFLES[0].format(rims, looks.spokes)
    if looks.spare_wheel:
        yield _TRIFLES[1]
    if looks.spoiler:
        yield _TRIFLES[2]


def _proportions(looks: Looks) -> Iterator[str]:
    limits = ((looks.length, 0.96, 1.05), (looks.height, 0.96, 1.05), (looks.width, 0.97, 1.03))
    for (size, small, large), (below, above) in zip(limits, _PROPORTIONS, strict=True):
        if not small <= size <= large:
            yield below if size < small else above


def _moments(sight: Sight) -> Iterator[str]:
    yield _WEATHER[sight.weather]
    if sight.light < _DARK or sight.light > _BRIGHT:
        yield _LIGHTS[sight.light > _BRIGHT]
    if sight.hidden in _HIDDEN:
        yield _HIDDEN[sight.hidden]


def _accent(rgb: RGB) -> str:
    return next(name for name, known in ACCENTS.items() if known == rgb)


def _listed(things: list[str]) -> str:
    *others, last = things
    return f"{', '.join(others)} and {last}" if others else last
