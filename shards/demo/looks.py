"""What an identity fixes: body type, proportions, paint and marks, drawn from its number.

    identity ──▶ [looks] ──▶ vehicle (solid model) ──▶ scene (one image) ──▶ demo dataset

Nothing here knows of geometry, cameras, light or weather.
"""

from dataclasses import dataclass

import numpy as np

RGB = tuple[int, int, int]

# Names and order of VeRi-776's colour and type numbers (1-based in its label files).
COLOURS: dict[str, RGB] = {
    "yellow": (226, 190, 40),
    "orange": (222, 112, 32),
    "green": (42, 120, 66),
    "gray": (122, 126, 130),
    "red": (178, 30, 34),
    "blue": (36, 72, 160),
    "white": (232, 234, 236),
    "golden": (186, 162, 112),
    "brown": (98, 62, 44),
    "black": (32, 33, 37),
}
_COLOUR_WEIGHTS = (5, 4, 6, 14, 12, 13, 18, 8, 6, 14)

ACCENTS: dict[str, RGB] = {
    "white": (240, 240, 240),
    "black": (24, 24, 28),
    "red": (206, 28, 36),
    "yellow": (244, 206, 30),
    "blue": (28, 92, 204),
    "green": (26, 150, 76),
    "orange": (240, 122, 22),
    "turquoise": (30, 182, 206),
    "pink": (198, 52, 150),
}
RIMS: dict[str, RGB] = {
    "silver": (190, 192, 196),
    "dark": (70, 72, 76),
    "white": (224, 226, 228),
    "golden": (178, 142, 66),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A body type. Sizes in metres; places along the body as fractions of its length from the nose."""

    weight: float  # how often it is drawn, relative to the others
    length: float
    width: float
    height: float
    clearance: float
    belt: float  # height of the lower edge of the windows
    nose: float  # height of the bonnet's front edge
    tail: float  # height of the boot's rear edge
    cowl: float  # foot of the windscreen
    roof_front: float
    roof_rear: float
    deck: float  # foot of the rear window
    wheel: float  # radius
    windows: tuple[tuple[float, float], ...]  # side windows, as spans of the cabin's side
    taper: float = 0.86  # width of nose and tail, and
    tumblehome: float = 0.80  # width of the roof, relative to the body's
    wheel_at: tuple[float, float] = (0.19, 0.80)
    end: float = 1.0  # where the painted body ends; a truck's box follows


_ONE, _CAB = ((0.02, 0.2),), ((0.1, 0.85),)
_TWO = ((0.06, 0.46), (0.50, 0.93))
_MORE = ((0.05, 0.35), (0.38, 0.66), (0.69, 0.95))
_ROW = tuple((0.05 + 0.15 * i, 0.18 + 0.15 * i) for i in range(6))
_BUS, _BOX = (0.22, 0.74), (0.14, 0.78)
# In the order of VeRi-776's type numbers, which count from 1.
SHAPES: dict[str, Shape] = {
    # weight, length, width, height; clearance, belt, nose, tail; cowl, roof front and rear, deck; wheel, windows, ...
    "sedan": Shape(20, 4.6, 1.80, 1.46, 0.22, 0.92, 0.70, 0.88, 0.27, 0.42, 0.70, 0.86, 0.33, _TWO),
    "suv": Shape(18, 4.6, 1.88, 1.80, 0.36, 1.10, 0.95, 1.02, 0.25, 0.37, 0.89, 0.97, 0.39, _MORE, 0.90, 0.84),
    "van": Shape(12, 5.1, 1.95, 2.25, 0.30, 1.15, 0.90, 1.13, 0.12, 0.26, 0.97, 0.98, 0.35, _ONE, 0.93, 0.90),
    "hatchback": Shape(14, 3.8, 1.72, 1.50, 0.22, 0.92, 0.70, 0.88, 0.24, 0.40, 0.84, 0.97, 0.31, _TWO),
    "mpv": Shape(9, 4.7, 1.86, 1.78, 0.25, 1.00, 0.78, 0.95, 0.15, 0.34, 0.90, 0.97, 0.34, _MORE, 0.88, 0.84),
    "pickup": Shape(9, 5.2, 1.88, 1.80, 0.40, 1.08, 0.98, 1.06, 0.25, 0.35, 0.52, 0.56, 0.40, _TWO, 0.92, 0.82),
    "bus": Shape(6, 8.4, 2.40, 2.95, 0.32, 1.30, 1.22, 1.28, 0.02, 0.04, 0.97, 0.98, 0.46, _ROW, 0.96, 0.93, _BUS),
    "truck": Shape(8, 6.4, 2.10, 2.30, 0.45, 1.25, 1.1, 1.2, 0.03, 0.08, 0.27, 0.28, 0.44, _CAB, 0.95, 0.90, _BOX, 0.3),
    "estate": Shape(8, 4.7, 1.80, 1.50, 0.22, 0.93, 0.70, 0.90, 0.27, 0.41, 0.91, 0.98, 0.33, _MORE),
}
LOADS = ("bars", "box", "ladder", "kayak", "lights", "sign", "luggage", "cooler")
STRIPES = ("single", "twin", "wide", "edges")
BANDS = ("low", "middle", "wide", "rear", "door")
EMBLEMS = ("disc", "diamond", "square")


@dataclass(frozen=True, slots=True)
class Looks:
    """Everything that an identity fixes; None where the vehicle goes without."""

    shape: str
    colour: str
    body: RGB
    length: float  # proportions, relative to the shape's
    width: float
    height: float
    rim: RGB
    spokes: int
    glass: RGB
    grille: RGB
    roof: RGB | None
    skirt: RGB | None  # two-tone paint: the lower part of the body
    stripe: tuple[str, RGB] | None  # along bonnet, roof and boot
    band: tuple[str, RGB] | None  # around the sides
    emblem: tuple[str, RGB] | None
    load: tuple[str, RGB] | None  # on the roof
    cargo: RGB  # a truck's box, what a pickup carries
    spare_wheel: bool
    spoiler: bool


def draw_looks(seed: int, identity: int) -> Looks:
    """The looks of one identity: a pure function of its arguments.

    Shapes and colours are few, so identities share them; three or four marks tell those apart.
    """
    rng = np.random.default_rng((seed, 1, identity))
    weights = np.array([s.weight for s in SHAPES.values()])
    shape = list(SHAPES)[rng.choice(len(SHAPES), p=weights / weights.sum())]
    colour = list(COLOURS)[rng.choice(len(COLOURS), p=np.array(_COLOUR_WEIGHTS) / sum(_COLOUR_WEIGHTS))]
    body = _shifted(COLOURS[colour], rng)
    marks = ["roof", "skirt", "stripe", "band", "emblem", "load"]
    chances = np.array([0.16, 0.14, 0.2, 0.2, 0.1, 0.2])
    worn = set(rng.choice(marks, size=rng.integers(3, 5), replace=False, p=chances).tolist())
    accent = {mark: _contrasting(body, rng) for mark in marks}
    style = {"stripe": STRIPES, "band": BANDS, "emblem": EMBLEMS, "load": LOADS}
    picked = {mark: str(rng.choice(names)) for mark, names in style.items()}
    styled = {mark: (picked[mark], accent[mark]) if mark in worn else None for mark in style}
    return Looks(
        shape=shape,
        colour=colour,
        body=body,
        length=float(rng.uniform(0.92, 1.09)),
        width=float(rng.uniform(0.95, 1.05)),
        height=float(rng.uniform(0.92, 1.09)),
        rim=list(RIMS.values())[rng.integers(4)],
        spokes=int(rng.integers(3, 8)),
        glass=((38, 48, 58), (22, 24, 28), (70, 92, 104))[rng.integers(3)],
        grille=((24, 24, 26), (60, 62, 64), (150, 152, 156))[rng.integers(3)],
        roof=accent["roof"] if "roof" in worn else None,
        skirt=accent["skirt"] if "skirt" in worn else None,
        cargo=_contrasting(body, rng),
        spare_wheel=shape == "suv" and bool(rng.random() < 0.4),
        spoiler=shape in ("sedan", "hatchback", "estate") and bool(rng.random() < 0.25),
        **styled,
    )


def _shifted(rgb: RGB, rng: np.random.Generator) -> RGB:
    """The same colour from another paint shop: a few levels lighter, darker, warmer or colder."""
    levels = np.clip(np.array(rgb) * rng.uniform(0.85, 1.12) + rng.uniform(-8, 8, size=3), 8, 245)
    r, g, b = (int(v) for v in levels)
    return r, g, b


def _contrasting(body: RGB, rng: np.random.Generator) -> RGB:
    """An accent colour that the eye tells from the body's."""
    far = [a for a in ACCENTS.values() if np.abs(np.subtract(a, body)).sum() > 170]
    return far[rng.integers(len(far))]
