"""One photograph: a vehicle model as one camera sees it, in some weather, at some moment.

    looks ──▶ vehicle ──▶ [scene: VehicleModel and Camera to Photo] ──▶ demo dataset

A camera fixes direction, height, background, light, colours, blur, noise and resolution; direction within its reach,
crop, weather and what stands in the way vary per image. Every photo is a pure function of (seed, identity, image
number, camera, cameras); pictures are painted at twice their size and then reduced.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shards.demo.vehicle import VehicleModel

# VeRi-776's number of each direction, by eighths of a turn from the front over the vehicle's left.
VIEWS = (0, 3, 2, 4, 1, 7, 5, 6)
WEATHER = ("clear", "shade", "rain", "fog")
HIDDEN = ("nothing", "pole", "vehicle", "leaves")
_SUPERSAMPLE = 2
_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True)
class Camera:
    """What stays the same in all photos of one camera."""

    eighth: int  # the direction it mostly sees, in eighths of a turn (see VIEWS)
    elevation: float  # radians above the horizon
    distance: float  # in lengths of the vehicle
    resolution: float  # pixels: square root of the vehicle's area in the photo
    light: np.ndarray  # float64 [3], unit vector towards the sun: right, up, towards the camera
    sun: float  # share of direct light
    colour: np.ndarray  # float64 [3, 3], white balance and saturation
    gamma: float
    blur: float  # radius in pixels
    grain: Image.Image  # noise to add, around 128
    quality: int  # of the JPEG
    backdrop: Image.Image


@dataclass(frozen=True, slots=True)
class Sight:
    """What the moment of a photo decides, and words can tell."""

    view: int  # VeRi-776's number, 0-7
    weather: str  # of WEATHER
    hidden: str  # what stands in front, of HIDDEN
    light: float  # the grey that comes out where a medium grey was painted, 0 … 1


@dataclass(frozen=True, slots=True)
class Photo:
    """One finished picture with its labels."""

    image: Image.Image
    quality: int
    sight: Sight
    keypoints: np.ndarray  # int64 [20, 2], x and y in pixels, -1 where not seen

    @property
    def view(self) -> int:
        return self.sight.view


@lru_cache(maxsize=64)
def get_camera(seed: int, camera: int) -> Camera:
    """Camera number `camera` (0-based); neighbours in number look from far apart."""
    rng = np.random.default_rng((seed, 2, camera))
    first = int(np.random.default_rng((seed, 3)).integers(8))
    side, height = rng.uniform(-1.1, 1.1), rng.uniform(0.5, 1.3)
    light = np.array([np.sin(side), height, np.cos(side)])
    balance = np.exp(rng.normal(0, 0.08, size=3))
    keep = rng.uniform(0.75, 1.1)
    level = rng.uniform(0.78, 1.16)
    grain = rng.normal(128, rng.uniform(2, 9), size=(256, 320, 3)).clip(0, 255).astype(np.uint8)
    return Camera(
        eighth=(first + 3 * camera) % 8,
        elevation=float(np.radians(rng.uniform(15, 32))),
        distance=float(rng.uniform(1.9, 4.0)),
        resolution=float(rng.uniform(82, 132)),
        light=light / np.linalg.norm(light),
        sun=float(rng.uniform(0.5, 1.0)),
        colour=np.diag(balance * level) @ (keep * np.eye(3) + (1 - keep) * _GREY),
        gamma=float(rng.uniform(0.8, 1.25)),
        blur=float(rng.uniform(0.0, 1.2)),
        grain=Image.fromarray(grain),
        quality=int(rng.integers(62, 93)),
        backdrop=_backdrop(rng),
    )


def take_photo(model: VehicleModel, camera: Camera, rng: np.random.Generator) -> Photo:
    """One photo of a vehicle; `rng` decides what varies per image."""
    eighth = (camera.eighth + rng.choice((-1, 0, 1), p=(0.28, 0.44, 0.28))) % 8
    azimuth = np.radians(45 * eighth + rng.uniform(-20, 20))
    right, up, back, eye = _pose(model, camera, azimuth, rng)
    points = _project(model.corners, right, up, back, eye)
    scale, origin, size = _crop(points, camera, rng)
    canvas = _ground(camera, size, rng)
    points = (points - origin) * scale
    sun = np.stack([right, up, back], axis=1) @ camera.light
    _cast_shadow(canvas, model, sun, lambda p: (_project(p, right, up, back, eye) - origin) * scale)
    _paint(canvas, model, points, eye, sun, camera.sun)
    hidden = _occlude(canvas, rng)
    weather, fog = _weather(canvas, rng)
    image, light = _develop(canvas, camera, fog, rng)
    facing = ((eye - model.landmarks) * model.landmark_normals).sum(axis=1) > 0
    spots = (_project(model.landmarks, right, up, back, eye) - origin) * scale / _SUPERSAMPLE
    inside = facing & (spots >= 0).all(axis=1) & (spots < image.size).all(axis=1)
    keypoints = np.where(inside[:, None], spots, -1).astype(np.int64)
    return Photo(image, camera.quality, Sight(VIEWS[eighth], weather, hidden, light), keypoints)


# --- geometry -------------------------------------------------------------------------------------------------


def _pose(model: VehicleModel, camera: Camera, azimuth: float, rng: np.random.Generator):
    """The camera's axes (right, up, back) and its place, in the vehicle's coordinates."""
    elevation = camera.elevation + rng.normal(0, 0.04)
    back = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    roll = rng.normal(0, 0.035)
    right, up = right * np.cos(roll) + up * np.sin(roll), up * np.cos(roll) - right * np.sin(roll)
    length = np.ptp(model.corners[:, 0])
    return right, up, back, back * length * camera.distance + (0.0, 0.0, 0.7)


def _project(points: np.ndarray, right, up, back, eye) -> np.ndarray:
    """[n, 3] metres -> [n, 2] on a screen at distance 1, y downwards."""
    rays = points - eye
    depth = -(rays @ back)
    return np.stack([rays @ right / depth, -(rays @ up) / depth], axis=1)


def _crop(points: np.ndarray, camera: Camera, rng: np.random.Generator):
    """Frame the vehicle as a detector would, never quite the same: scale, upper left corner, canvas size."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = high - low
    scale = camera.resolution * _SUPERSAMPLE * rng.uniform(0.9, 1.1) / np.sqrt(extent.prod())
    before, after = rng.uniform(-0.04, 0.13, size=(2, 2)) * extent
    size = tuple(round(v) * _SUPERSAMPLE for v in (extent + before + after) * scale / _SUPERSAMPLE)
    return scale, low - before, size


# --- painting -------------------------------------------------------------------------------------------------


def _paint(canvas: Image.Image, model: VehicleModel, points: np.ndarray, eye, sun, direct: float) -> None:
    """Faces that look at the camera, group after group from far to near."""
    seen = ((eye - model.anchors) * model.normals).sum(axis=1) > 0
    lit = model.ambient + (1 - model.ambient) * direct * np.clip(model.normals @ sun, 0, 1) * 1.35
    colours = np.clip(model.rgb * lit[:, None], 0, 255).astype(int).tolist()
    distance = ((model.group_centres - eye) ** 2).sum(axis=1)
    order = np.lexsort((-distance, model.group_ranks))
    flat, starts = points.ravel().tolist(), (model.starts * 2).tolist()
    polygon = ImageDraw.Draw(canvas).polygon
    for group in order.tolist():
        for face in range(model.group_starts[group], model.group_starts[group + 1]):
            if seen[face]:
                polygon(flat[starts[face] : starts[face + 1]], fill=tuple(colours[face]))


def _cast_shadow(canvas: Image.Image, model: VehicleModel, sun: np.ndarray, to_canvas) -> None:
    """The ground is darker below the vehicle and on the side away from the sun."""
    low, high = model.corners.min(axis=0), model.corners.max(axis=0)
    base = np.array([(x, y, 0.0) for x, y in _rectangle(low, high)])
    fall = -sun[:2] / max(sun[2], 0.4) * min(high[2], 1.6) * 0.6
    draw = ImageDraw.Draw(canvas, "RGBA")
    for share, alpha in ((1.0, 70), (0.5, 60), (0.0, 110)):
        shifted = base + np.append(fall * share, 0.0)
        draw.polygon(to_canvas(shifted).ravel().tolist(), fill=(10, 10, 14, alpha))


def _rectangle(low: np.ndarray, high: np.ndarray) -> list[tuple[float, float]]:
    return [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]


def _ground(camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A piece of the camera's backdrop, stretched over the canvas."""
    width, height = camera.backdrop.size
    across, down = rng.uniform(0.45, 0.6) * width, rng.uniform(0.6, 0.8) * height
    x, y = rng.uniform(0, width - across), rng.uniform(0, height - down)
    return camera.backdrop.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + across, y + down))


def _occlude(canvas: Image.Image, rng: np.random.Generator) -> str:
    """In a quarter of the photos something stands in front: a pole, another vehicle's roof, leaves. Returns which."""
    kind = rng.random()
    if kind > 0.26:
        return "nothing"
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas)
    if kind < 0.1:
        x, thick = rng.uniform(0.05, 0.95) * width, rng.uniform(0.03, 0.07) * width
        grey = int(rng.integers(50, 170))
        draw.rectangle((x, 0, x + thick, height), fill=(grey, grey, grey + 5))
        draw.rectangle((x, 0, x + thick * 0.3, height), fill=(grey // 2, grey // 2, grey // 2))
        return "pole"
    if kind < 0.18:
        x, top = rng.uniform(-0.3, 0.7) * width, rng.uniform(0.74, 0.88) * height
        colour = tuple(rng.integers(20, 230, size=3).tolist())
        across = rng.uniform(0.4, 0.7) * width
        draw.rounded_rectangle((x, top, x + across, height * 1.3), radius=int(height * 0.06), fill=colour)
        glass = (x + 0.12 * across, top + 0.06 * height, x + 0.88 * across, height)
        draw.rectangle(glass, fill=tuple(v // 3 for v in colour))
        return "vehicle"
    centre = np.array([rng.choice((0.0, 1.0)) * width, rng.uniform(0, 0.5) * height])
    for _ in range(26):
        x, y = centre + rng.normal(0, 0.11, size=2) * (width, height)
        r = rng.uniform(0.02, 0.06) * width
        green = int(rng.integers(50, 120))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(green // 2, green, green // 3))
    return "leaves"


def _weather(canvas: Image.Image, rng: np.random.Generator) -> tuple[str, float]:
    """Sun and shade, rain or fog, painted; returns which, and the share of grey that fog mixes in."""
    kind = rng.random()
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas, "RGBA")
    if kind < 0.22:  # the shadow of a house or a tree lies over a part of the picture
        x, lean = rng.uniform(0.2, 0.8) * width, rng.uniform(-0.4, 0.4) * width
        edge = 0 if rng.random() < 0.5 else width
        draw.polygon([edge, 0, x + lean, 0, x - lean, height, edge, height], fill=(8, 10, 22, 105))
        return "shade", 0.0
    if kind < 0.34:
        slant = rng.uniform(-0.1, 0.1) * height
        for x, y in rng.uniform(0, 1, size=(45, 2)) * (width, height):
            draw.line((x, y, x + slant, y + 0.13 * height), fill=(205, 212, 222, 90), width=2)
        return "rain", float(rng.uniform(0.08, 0.22))
    if kind < 0.46:
        return "fog", float(rng.uniform(0.12, 0.35))
    return "clear", 0.0


def _develop(canvas: Image.Image, camera: Camera, fog: float, rng: np.random.Generator) -> tuple[Image.Image, float]:
    """Reduce to the photo's size; then the camera's colours, exposure, blur and grain. Returns it and its `light`."""
    image = canvas.reduce(_SUPERSAMPLE)
    exposure = np.exp(rng.normal(0, 0.08))
    matrix = np.concatenate([camera.colour * exposure * (1 - fog), np.full((3, 1), 188.0 * fog)], axis=1)
    image = image.convert("RGB", tuple(matrix.ravel().tolist()))
    if camera.blur > 0.25:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.7, 1.3)))
    light = float((camera.colour.sum(axis=1) @ _GREY * exposure * 0.5) ** camera.gamma)
    curve = (255 * (np.arange(256) / 255) ** camera.gamma).round().astype(int).tolist()
    pixels = np.asarray(image.point(curve * 3), dtype=np.int16)
    grain = np.asarray(camera.grain, dtype=np.int16)
    y, x = (int(rng.integers(max(1, g - p))) for g, p in zip(grain.shape[:2], pixels.shape[:2], strict=True))
    patch = grain[y : y + pixels.shape[0], x : x + pixels.shape[1]]
    return Image.fromarray((pixels + patch - 128).clip(0, 255).astype(np.uint8)), light


# --- backgrounds ----------------------------------------------------------------------------------------------


def _backdrop(rng: np.random.Generator) -> Image.Image:
    """A street as this camera sees it: ground, lane lines, and what lies beyond at the upper edge."""
    width, height = 320, 240
    grounds = ((92, 94, 98), (138, 136, 130), (64, 66, 72), (128, 98, 84), (106, 116, 104), (84, 92, 112))
    picture = Image.new("RGB", (width, height), grounds[rng.integers(len(grounds))])
    draw = ImageDraw.Draw(picture)
    lean, gap = rng.uniform(-1.4, 1.4) * width, rng.uniform(60, 150)
    paint = ((222, 222, 214), (216, 178, 52))[rng.integers(2)]
    if rng.random() < 0.8:
        for x in np.arange(-2 * width, 3 * width, gap):
            draw.line((x, height, x + lean, 0), fill=paint, width=int(rng.integers(3, 8)))
    beyond = ((58, 92, 48), (132, 78, 62), (150, 152, 158), (40, 44, 50), (164, 148, 112), (96, 128, 168))
    edge = rng.uniform(0.12, 0.42) * height
    tilt = rng.uniform(-0.15, 0.15) * height
    far = beyond[rng.integers(len(beyond))]
    draw.polygon([0, 0, width, 0, width, edge + tilt, 0, edge - tilt], fill=far)
    for _ in range(int(rng.integers(4, 14))):  # windows, trunks, parked things
        x, y = rng.uniform(0, width), rng.uniform(0, edge)
        wide, tall = rng.uniform(6, 44), rng.uniform(8, 36)
        shade = rng.uniform(0.5, 1.5)
        draw.rectangle((x, y, x + wide, min(y + tall, edge + 6)), fill=tuple(min(255, int(v * shade)) for v in far))
    draw.line((0, edge - tilt, width, edge + tilt), fill=(176, 174, 168), width=int(rng.integers(2, 8)))
    stains = rng.normal(0, 14, size=(12, 16)) + 128
    fine = rng.normal(0, 9, size=(height, width))
    coarse = np.asarray(Image.fromarray(stains.clip(0, 255).astype(np.uint8)).resize((width, height)), dtype=float)
    texture = np.asarray(picture, dtype=float) + (coarse - 128 + fine)[:, :, None]
    return Image.fromarray(texture.clip(0, 255).astype(np.uint8))
