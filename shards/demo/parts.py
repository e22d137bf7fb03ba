"""Parts that a vehicle's bodies are fitted with: wheels, mirrors, cargo, and what is on the roof.

    looks ──▶ vehicle, with [parts] ──▶ scene ──▶ demo dataset

Frame gives all of them the identity's measures in metres.
"""

import numpy as np

from shards.demo.looks import RGB, SHAPES, Looks
from shards.demo.solids import FaceBuilder, UpperBody

RUBBER, TAIL_LAMP = (26, 26, 28), (190, 22, 26)
# Ranks of groups: what carries is painted before what it carries.
BODY, CABIN, LOAD = range(3)


class Frame:
    """Looks and shape with the identity's proportions applied, in metres."""

    def __init__(self, looks: Looks):
        shape = SHAPES[looks.shape]
        self.looks, self.shape = looks, shape
        self.length, self.half = shape.length * looks.length, shape.width * looks.width / 2
        self.belt, self.nose, self.tail = (z * looks.height for z in (shape.belt, shape.nose, shape.tail))
        self.height, self.clearance, self.wheel = shape.height * looks.height, shape.clearance, shape.wheel

    def x(self, fraction: float) -> float:
        return self.length * (0.5 - fraction)


def shade(rgb: RGB, factor: float) -> RGB:
    r, g, b = (int(v * factor) for v in rgb)
    return r, g, b


def mix(rgb: RGB, other: RGB, share: float) -> RGB:
    r, g, b = (int(v + (w - v) * share) for v, w in zip(rgb, other, strict=True))
    return r, g, b


# --- wheels and mirrors --------------------------------------------------------------------------------


def tread(builder: FaceBuilder, frame: Frame, fraction: float) -> None:
    """What front and rear show of a pair of tyres, under the body."""
    x, r = frame.x(fraction), frame.wheel
    for sign in (-1, 1):
        y = sorted((sign * (frame.half - 0.24), sign * frame.half * 0.97))
        builder.box((x - 0.8 * r, x + 0.8 * r), (y[0], y[1]), (0.0, r), RUBBER)


def wheel(builder: FaceBuilder, frame: Frame, fraction: float, half: float) -> None:
    """Arch, tyre, rim and spokes on both sides of a body of that half width; the arch cuts into its paint."""
    looks, x, r, half = frame.looks, frame.x(fraction), frame.wheel, half + 0.01
    builder.around((x, 0.0, r))

    def disc(radius: float, rgb: RGB, ambient: float) -> None:
        angles = np.arange(14) * 2 * np.pi / 14
        ring = np.stack([x + radius * np.cos(angles), np.full(14, half), r + radius * np.sin(angles)], axis=1)
        for sign in (-1, 1):
            builder.face(ring * (1, sign, 1), rgb, ambient)

    disc(r * 1.2, (16, 16, 18), 1.0)
    disc(r, RUBBER, 0.9)
    disc(r * 0.68, looks.rim, 0.7)
    disc(r * 0.6, shade(looks.rim, 0.4), 0.8)
    for spoke in range(looks.spokes):
        angle = 2 * np.pi * spoke / looks.spokes + 0.3
        fan = [(0.0, 0.0), (0.62, angle - 0.3), (0.62, angle + 0.3)]
        points = np.array([(x + r * d * np.cos(a), half, r + r * d * np.sin(a)) for d, a in fan])
        for sign in (-1, 1):
            builder.face(points * (1, sign, 1), looks.rim, 0.7)


def mirrors(builder: FaceBuilder, upper: UpperBody, frame: Frame) -> None:
    x, z, half = upper.x[0] - 0.12 * (upper.x[0] - upper.x[1]), upper.z[0], upper.half[0]
    for sign in (-1, 1):
        y = sorted((sign * (half + 0.02), sign * (half + 0.2)))
        builder.group(CABIN if frame.shape.end == 1.0 else BODY, (x, sign * (half + 0.1), z + 0.1))
        builder.box((x - 0.14, x), (y[0], y[1]), (z + 0.02, z + 0.18), shade(frame.looks.body, 0.8))


# --- what a vehicle carries -----------------------------------------------------------------------------------


def cargo_box(builder: FaceBuilder, frame: Frame) -> None:
    """A truck's rear: frame, wheel, and a box that wears the marks of the identity on its large sides."""
    looks, half = frame.looks, frame.half
    front, rear, floor, top = frame.x(0.32), frame.x(1.0), 0.95, frame.height * 1.28
    builder.group(BODY, ((front + rear) / 2, 0.0, (floor + top) / 2))
    tread(builder, frame, frame.shape.wheel_at[1])
    builder.box((rear + 0.1, front + 0.2), (-half * 0.8, half * 0.8), (0.55, floor), (44, 44, 48))
    for sign in (-1, 1):
        y = sorted((sign * half * 0.5, sign * half * 0.78))
        builder.box((rear + 0.05, rear + 0.1), (y[0], y[1]), (0.65, 0.85), TAIL_LAMP)
    wheel(builder, frame, frame.shape.wheel_at[1], half)
    box = UpperBody(builder, [(x, z, half * 1.04) for x, z in _outline(front, rear, floor, top)])
    box.paint(looks.cargo)
    mark = looks.band or looks.emblem or looks.stripe
    if mark:
        along = {"rear": (0.55, 1.0), "door": (0.1, 0.5)}.get(mark[0], (0.0, 1.0))
        box.side_span(along, (0.3, 0.68), mark[1] if mark[1] != looks.cargo else looks.body)
    if looks.roof:
        box.edge(UpperBody.ROOF, (-1, 1), (0, 1), looks.roof)
    box.edge(UpperBody.BACK, (-0.02, 0.02), (0, 1), shade(looks.cargo, 0.5))


def _outline(front: float, rear: float, low: float, high: float) -> list[tuple[float, float]]:
    return [(front, low), (front, high), (rear, high), (rear, low)]


def bed_cargo(builder: FaceBuilder, frame: Frame) -> None:
    """A pickup carries a crate in the colour of its cargo."""
    front, rear = frame.x(0.62), frame.x(0.9)
    builder.group(CABIN, ((front + rear) / 2, 0.0, frame.belt + 0.2))
    half = frame.half * 0.62
    builder.box((rear, front), (-half, half), (frame.belt - 0.02, frame.belt + 0.36), frame.looks.cargo)


def roof_load(builder: FaceBuilder, upper: UpperBody, frame: Frame, load: tuple[str, RGB]) -> None:
    style, rgb = load
    front, rear, top, half = upper.x[1], upper.x[2], upper.z[1], upper.half[1]
    long, middle = front - rear, (front + rear) / 2
    builder.group(LOAD, (middle, 0.0, top + 0.15))

    def put(along: tuple[float, float], across: tuple[float, float], height: float, colour: RGB) -> None:
        """A box on the roof: along 0 (front) to 1 (rear), across -1 (right) to 1 (left)."""
        x, y = (front - along[1] * long, front - along[0] * long), (across[0] * half, across[1] * half)
        builder.box(x, y, (top, top + height), colour)

    tall = 0.34 + 0.05 * (frame.height > 2)
    if style == "bars":
        for at in (0.85, 0.5, 0.15):
            put((at - 0.05, at + 0.05), (-1, 1), 0.13, rgb)
    elif style == "box":
        put((0.12, 0.88), (-0.66, 0.66), tall, rgb)
    elif style == "ladder":
        for across in (-0.55, 0.35):
            put((-0.05, 1.1), (across, across + 0.2), 0.12, rgb)
        for at in (0.8, 0.5, 0.2):
            put((at - 0.04, at + 0.04), (-0.5, 0.5), 0.1, rgb)
    elif style == "kayak":
        put((-0.25, 1.25), (-0.2, 0.3), 0.28, rgb)
    elif style == "lights":
        put((0.2, 0.36), (-0.85, 0.0), 0.2, (214, 24, 30))
        put((0.2, 0.36), (0.0, 0.85), 0.2, (28, 64, 214))
    elif style == "sign":
        put((0.4, 0.56), (-0.5, 0.5), 0.3, rgb)
    elif style == "luggage":
        put((0.55, 0.95), (-0.7, 0.6), tall, (112, 74, 44))
        put((0.1, 0.5), (-0.6, 0.7), tall * 0.8, rgb)
    elif style == "cooler":
        put((0.45, 0.85), (-0.5, 0.5), 0.3, (214, 216, 218))
        put((0.52, 0.78), (-0.3, 0.3), 0.34, rgb)
