"""The solid model of one vehicle, seen from nowhere yet: its looks turned into flat coloured faces.

    looks ──▶ [vehicle: Looks to VehicleModel] ──▶ scene (one image) ──▶ demo dataset

Bodies, glass, lamps and marks are laid out here; wheels and what is carried are in `parts`, how faces are made in
`solids`, how they are lit and projected in `scene`. Marks go on several sides: most directions show them.
"""

from dataclasses import dataclass

import numpy as np

from shards.demo.looks import RGB, Looks
from shards.demo.parts import (
    BODY,
    CABIN,
    RUBBER,
    TAIL_LAMP,
    Frame,
    bed_cargo,
    cargo_box,
    mirrors,
    mix,
    roof_load,
    shade,
    tread,
    wheel,
)
from shards.demo.solids import FaceBuilder, LowerBody, UpperBody

_PLATE, _LAMP, _SHEEN = (226, 226, 214), (248, 244, 220), (150, 170, 186)


@dataclass(frozen=True, slots=True)
class VehicleModel:
    """Faces as flat arrays. V = corners of all faces, F = faces, G = groups."""

    corners: np.ndarray  # float64 [V, 3], metres; face f owns rows starts[f] : starts[f + 1]
    starts: np.ndarray  # int64 [F + 1]
    normals: np.ndarray  # float64 [F, 3], unit length, outward
    anchors: np.ndarray  # float64 [F, 3], the middle of each face
    rgb: np.ndarray  # float64 [F, 3], 0-255 in full light
    ambient: np.ndarray  # float64 [F], share of the colour that is there without direct light
    group_starts: np.ndarray  # int64 [G + 1], faces of each group
    group_ranks: np.ndarray  # int64 [G]: lower ranks are painted first, equal ranks far to near
    group_centres: np.ndarray  # float64 [G, 3]
    landmarks: np.ndarray  # float64 [20, 3], VeRi-776's key points in its order
    landmark_normals: np.ndarray  # float64 [20, 3]: a key point is seen from where its normal points


def build_vehicle(looks: Looks) -> VehicleModel:
    """The model of a vehicle with these looks: a pure function, some 150 faces."""
    frame = Frame(looks)
    builder = FaceBuilder()
    lower, upper = _lower_body(builder, frame), _upper_body(builder, frame)

    builder.group(BODY, lower.centre)
    _paint_lower(lower, frame)
    if looks.shape == "truck":
        _paint_upper(upper, frame)  # the cab is one body beside the cargo box
        cargo_box(builder, frame)
    else:
        builder.group(CABIN, upper.centre)
        _paint_upper(upper, frame)
    mirrors(builder, upper, frame)
    if looks.shape == "pickup":
        bed_cargo(builder, frame)
    if looks.load:
        roof_load(builder, upper, frame, looks.load)
    return _model(builder, lower, upper, frame)


def _lower_body(builder: FaceBuilder, frame: Frame) -> LowerBody:
    shape, half, foot = frame.shape, frame.half, frame.clearance
    narrow, end = half * shape.taper, shape.end
    rear = narrow if end == 1.0 else half
    profile = [
        (0.015, foot, narrow * 0.97),
        (0.0, foot + 0.5 * (frame.nose - foot), narrow),
        (0.012, frame.nose, narrow),
        (shape.cowl, frame.belt, half),
        (shape.deck, frame.belt, half),
        (end - 0.01, frame.tail, rear),
        (end, foot + 0.5 * (frame.tail - foot), rear),
        (end - 0.012, foot, rear * 0.97),
    ]
    return LowerBody(builder, [(frame.x(f), z, h) for f, z, h in profile])


def _upper_body(builder: FaceBuilder, frame: Frame) -> UpperBody:
    shape = frame.shape
    foot, top = frame.half * 0.97, frame.half * shape.tumblehome
    places = [(shape.cowl, foot), (shape.roof_front, top), (shape.roof_rear, top), (shape.deck, foot)]
    heights = [frame.belt, frame.height, frame.height, frame.belt]
    return UpperBody(builder, [(frame.x(f), z, half) for (f, half), z in zip(places, heights, strict=True)])


# --- lower body: paint, face, rear, wheels --------------------------------------------------------------------


def _paint_lower(lower: LowerBody, frame: Frame) -> None:
    looks, shape = frame.looks, frame.shape
    wheels = [f for f in shape.wheel_at if f < shape.end]
    for fraction in wheels:
        tread(lower.builder, frame, fraction)
    lower.paint(looks.body)
    lower.side_span((0.0, 1.0), (0.0, 0.3), shade(looks.body, 0.72))  # sills turn away from the sky
    if looks.skirt:
        lower.side_span((0.0, 1.0), (0.0, 0.5), looks.skirt)
        for edge in (LowerBody.BUMPER, LowerBody.REAR_BUMPER):
            lower.edge(edge, (-1, 1), (0, 1), looks.skirt)
    _band(lower, frame)
    for seam in (0.0, 0.5, 1.0) if shape.end == 1.0 else (0.9,):
        place = shape.cowl + 0.02 + seam * (min(shape.deck, 0.82) - shape.cowl - 0.06)
        lower.side_span((place, place + 0.006), (0.12, 0.97), shade(looks.body, 0.45))
    _front_face(lower, frame)
    _rear_face(lower, frame)
    if looks.stripe:
        _stripe(lower, LowerBody.BONNET, looks.stripe)
        _stripe(lower, LowerBody.BOOT, looks.stripe)
    if looks.shape == "pickup":
        lower.edge(LowerBody.BOOT, (-0.86, 0.86), (0.04, 0.95), (34, 34, 36))
    for fraction in wheels:
        beside = np.interp(-frame.x(fraction), -lower.x[2:-2], lower.half[2:-2])
        wheel(lower.builder, frame, fraction, float(beside))
    if looks.emblem:
        _emblem(lower, frame, looks.emblem)


def _front_face(lower: LowerBody, frame: Frame) -> None:
    looks = frame.looks
    lower.edge(LowerBody.FRONT, (-0.5, 0.5), (0.12, 0.85), looks.grille)
    for sign in (-1, 1):
        lower.edge(LowerBody.FRONT, (sign * 0.58, sign * 0.97), (0.25, 0.9), _LAMP, 0.95)
        lower.edge(LowerBody.BUMPER, (sign * 0.62, sign * 0.85), (0.35, 0.65), (206, 204, 190), 0.8)
    lower.edge(LowerBody.BUMPER, (-0.55, 0.55), (0.1, 0.5), (30, 30, 32))
    lower.edge(LowerBody.BUMPER, (-0.27, 0.27), (0.6, 0.95), _PLATE, 0.8)


def _rear_face(lower: LowerBody, frame: Frame) -> None:
    for sign in (-1, 1):
        lower.edge(LowerBody.REAR, (sign * 0.66, sign * 0.98), (0.05, 0.75), TAIL_LAMP, 0.9)
    lower.edge(LowerBody.REAR, (-0.27, 0.27), (0.3, 0.8), _PLATE, 0.8)
    lower.edge(LowerBody.REAR_BUMPER, (-0.9, 0.9), (0.55, 1.0), (40, 40, 42))
    if frame.looks.spare_wheel:
        lower.edge(LowerBody.REAR, (-0.3, 0.5), (-0.3, 1.0), RUBBER)
        lower.edge(LowerBody.REAR, (-0.16, 0.36), (-0.05, 0.75), frame.looks.rim)


def _band(lower: LowerBody, frame: Frame) -> None:
    """A band around the sides; it runs on over front and rear where it is not a mark of the doors."""
    if not frame.looks.band:
        return
    style, rgb = frame.looks.band
    along, up = {
        "low": ((0.0, 1.0), (0.28, 0.46)),
        "middle": ((0.0, 1.0), (0.52, 0.74)),
        "wide": ((0.0, 1.0), (0.34, 0.84)),
        "rear": ((0.6, 1.0), (0.1, 1.0)),
        "door": ((0.3, 0.6), (0.05, 1.0)),
    }[style]
    lower.side_span(along, up, rgb)
    if along[0] == 0.0:
        lower.edge(LowerBody.FRONT, (-1, 1), (0.0, 0.4), rgb)
    if along[1] == 1.0:
        lower.edge(LowerBody.REAR, (-1, 1), (0.3, 1.0), rgb)


def _stripe(solid: LowerBody | UpperBody, edge: int, stripe: tuple[str, RGB]) -> None:
    style, rgb = stripe
    spans = {
        "single": [(-0.17, 0.17)],
        "twin": [(-0.42, -0.12), (0.12, 0.42)],
        "wide": [(-0.5, 0.5)],
        "edges": [(-1.0, -0.66), (0.66, 1.0)],
    }[style]
    for span in spans:
        solid.edge(edge, span, (0.0, 1.0), rgb)


def _emblem(lower: LowerBody, frame: Frame, emblem: tuple[str, RGB]) -> None:
    """A sign on the doors, as large as they are, and on the bonnet."""
    style, rgb = emblem
    corners = {"disc": 12, "diamond": 4, "square": 4}[style]
    turn = np.pi / 4 if style == "square" else 0.0
    angles = np.arange(corners) * 2 * np.pi / corners + turn
    door = (frame.shape.cowl + min(frame.shape.deck, 0.75)) / 2
    wide = 0.42 / frame.length
    lower.side([(door + wide * np.cos(a), 0.56 + 0.4 * np.sin(a)) for a in angles], rgb, 0.65)
    centre = lower.x[2:4].mean(), lower.z[2:4].mean()
    slope = (lower.z[3] - lower.z[2]) / (lower.x[3] - lower.x[2])
    reach = (lower.x[2] - lower.x[3]) * 0.42
    if reach > 0.2:
        points = [(centre[0] + reach * np.cos(a), 0.4 * np.sin(a)) for a in angles]
        lower.builder.around(lower.centre)
        lower.builder.face([(x, y, centre[1] + slope * (x - centre[0])) for x, y in points], rgb, 0.65)


# --- upper body: paint, glass, mirrors ------------------------------------------------------------------------


def _paint_upper(upper: UpperBody, frame: Frame) -> None:
    looks, shape = frame.looks, frame.shape
    upper.paint(looks.body)
    upper.edge(UpperBody.SCREEN, (-0.92, 0.92), (0.1, 0.9), looks.glass, 0.8)
    upper.edge(UpperBody.SCREEN, (0.2, 0.75), (0.35, 0.88), mix(looks.glass, _SHEEN, 0.45), 0.9)
    if shape.end == 1.0:
        upper.edge(UpperBody.BACK, (-0.86, 0.86), (0.16, 0.62), looks.glass, 0.8)
    for front, rear in shape.windows:
        upper.side_span((front, rear), (0.1, 0.86), looks.glass, 0.8)
        slant = [(front + 0.3 * (rear - front), 0.1), (front + 0.55 * (rear - front), 0.1)]
        slant += [(front + 0.8 * (rear - front), 0.86), (front + 0.55 * (rear - front), 0.86)]
        upper.side(slant, mix(looks.glass, _SHEEN, 0.35), 0.9)
    if looks.shape == "van":
        _van_panels(upper, looks)
    if looks.roof:
        upper.edge(UpperBody.ROOF, (-1, 1), (0, 1), looks.roof)
        upper.side_span((0.0, 1.0), (0.86, 1.0), looks.roof)
        upper.edge(UpperBody.SCREEN, (-1, 1), (0.9, 1.0), looks.roof)
        upper.edge(UpperBody.BACK, (-1, 1), (0.0, 0.15), looks.roof)
    if looks.stripe:
        _stripe(upper, UpperBody.ROOF, looks.stripe)
    if looks.spoiler:
        x, z, half = upper.x[2], upper.z[2], upper.half[2]
        upper.builder.box((x - 0.22, x), (-half, half), (z - 0.03, z + 0.05), looks.roof or looks.body)


def _van_panels(upper: UpperBody, looks: Looks) -> None:
    """The windowless sides of a van carry what doors are too small for."""
    upper.side_span((0.24, 0.245), (0.0, 0.95), shade(looks.body, 0.5))
    mark = looks.band or looks.emblem
    if mark:
        upper.side_span((0.3, 0.95), (0.15, 0.7), mark[1])


# --- key points and the finished arrays -----------------------------------------------------------------------


def _landmarks(lower: LowerBody, upper: UpperBody, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """VeRi-776's 20 key points, in its order, with the direction that each of them faces."""
    left, ahead, back = (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)
    nose, tail, half = lower.x.max(), frame.x(1.0), frame.half
    front_wheel, rear_wheel = (frame.x(f) for f in frame.shape.wheel_at)
    lamp, plate = (lower.z[1] + lower.z[2]) / 2, lower.z[0] + 0.3
    rear_lamp = (lower.z[5] + lower.z[6]) / 2
    r, roof, top = frame.wheel, frame.height, upper.half[1]
    points = [
        ((front_wheel, half, r), left),
        ((rear_wheel, half, r), left),
        ((front_wheel, -half, r), (0, -1, 0)),
        ((rear_wheel, -half, r), (0, -1, 0)),
        ((nose, -half * 0.65, plate), ahead),  # fog lamps
        ((nose, half * 0.65, plate), ahead),
        ((nose, -half * 0.7, lamp), ahead),  # head lamps
        ((nose, half * 0.7, lamp), ahead),
        ((nose, 0.0, lamp), ahead),  # badge
        ((nose, 0.0, plate), ahead),
        ((upper.x[0], upper.half[0] + 0.1, upper.z[0] + 0.1), (0.5, 1, 0)),  # mirrors
        ((upper.x[0], -upper.half[0] - 0.1, upper.z[0] + 0.1), (0.5, -1, 0)),
        ((upper.x[1], -top, roof), (1, -1, 1)),  # roof corners
        ((upper.x[1], top, roof), (1, 1, 1)),
        ((upper.x[2], top, roof), (-1, 1, 1)),
        ((upper.x[2], -top, roof), (-1, -1, 1)),
        ((tail, half * 0.75, rear_lamp), back),
        ((tail, -half * 0.75, rear_lamp), back),
        ((tail, 0.0, rear_lamp + 0.15), back),
        ((tail, 0.0, rear_lamp - 0.1), back),
    ]
    places, normals = zip(*points, strict=True)
    return np.array(places, dtype=float), np.array(normals, dtype=float)


def _model(builder: FaceBuilder, lower: LowerBody, upper: UpperBody, frame: Frame) -> VehicleModel:
    points, normals, rgb, ambient = zip(*builder.faces, strict=True)
    first, ranks, centres = zip(*builder.groups, strict=True)
    landmarks, landmark_normals = _landmarks(lower, upper, frame)
    return VehicleModel(
        corners=np.concatenate(points),
        starts=np.cumsum([0, *map(len, points)]),
        normals=np.array(normals),
        anchors=np.array([p.mean(axis=0) for p in points]),
        rgb=np.array(rgb, dtype=float),
        ambient=np.array(ambient),
        group_starts=np.array([*first, len(points)]),
        group_ranks=np.array(ranks),
        group_centres=np.array(centres),
        landmarks=landmarks,
        landmark_normals=landmark_normals,
    )
