"""Building bricks of the vehicle model: flat faces in groups, boxes, and convex bodies with places to paint on.

    looks ──▶ vehicle, built from [solids] ──▶ scene ──▶ demo dataset

Axes in metres: x forward, y to the vehicle's left, z up, ground at z = 0, origin under the middle. A group is
painted whole, so that sorting a few groups by distance is enough to hide what is behind (everything stands on
something convex and is seen from above).
"""

import numpy as np

from shards.demo.looks import RGB


class FaceBuilder:
    """Collects faces, group by group."""

    def __init__(self) -> None:
        self.faces: list[tuple[np.ndarray, np.ndarray, RGB, float]] = []
        self.groups: list[tuple[int, int, tuple[float, float, float]]] = []
        self._centre = np.zeros(3)

    def group(self, rank: int, centre: tuple[float, float, float]) -> None:
        """Open a group; the faces that follow belong to it and face away from `centre` (see `around`)."""
        self.groups.append((len(self.faces), rank, centre))
        self.around(centre)

    def around(self, centre: tuple[float, float, float]) -> None:
        """Faces that follow belong to a convex body around `centre`: their outside is the side away from it."""
        self._centre = np.array(centre, dtype=float)

    def face(self, corners: list | np.ndarray, rgb: RGB, ambient: float = 0.5) -> None:
        points = np.asarray(corners, dtype=float)
        following = np.roll(points, -1, axis=0)
        normal = np.cross(points, following).sum(axis=0)  # Newell: twice the area, also where not quite flat
        length = np.linalg.norm(normal)
        if length < 1e-9:
            return  # a side of no area, as the bonnet of a bus
        if normal @ (points.mean(axis=0) - self._centre) < 0:
            normal = -normal
        self.faces.append((points, normal / length, rgb, ambient))

    def box(self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], rgb: RGB) -> None:
        """An upright box without its underside."""
        self.around((sum(x) / 2, sum(y) / 2, sum(z) / 2))
        for i in (0, 1):
            self.face([(x[i], y[0], z[0]), (x[i], y[1], z[0]), (x[i], y[1], z[1]), (x[i], y[0], z[1])], rgb)
            self.face([(x[0], y[i], z[0]), (x[1], y[i], z[0]), (x[1], y[i], z[1]), (x[0], y[i], z[1])], rgb)
        self.face([(x[0], y[0], z[1]), (x[1], y[0], z[1]), (x[1], y[1], z[1]), (x[0], y[1], z[1])], rgb)


class Solid:
    """A convex body: a profile in the x-z plane, given a width at each of its points.

    `profile` [n, 3] rows are (x, z, half width), from the lower front over the top to the lower rear.
    """

    def __init__(self, builder: FaceBuilder, profile: list[tuple[float, float, float]]):
        self.builder = builder
        self.x, self.z, self.half = np.array(profile, dtype=float).T
        self.centre = (self.x.mean(), 0.0, self.z.mean())

    def paint(self, rgb: RGB) -> None:
        self.builder.around(self.centre)
        for i in range(len(self.x) - 1):
            self.edge(i, (-1, 1), (0, 1), rgb)
        for sign in (-1, 1):
            self.builder.face(np.stack([self.x, sign * self.half, self.z], axis=1), rgb)

    def edge(self, i: int, u: tuple, v: tuple, rgb: RGB, ambient: float = 0.5) -> None:
        """A patch of the face between profile points i and i + 1: u across (-1 right to 1 left), v along."""
        self.builder.around(self.centre)
        points = []
        for along, across in ((v[0], u[0]), (v[0], u[1]), (v[1], u[1]), (v[1], u[0])):
            x, z, half = (a[i] + (a[i + 1] - a[i]) * along for a in (self.x, self.z, self.half))
            points.append((x, across * half, z))
        self.builder.face(points, rgb, ambient)

    def side_point(self, along: float, up: float) -> tuple[float, float, float]:
        """(x, half width, z) at fractions of the side: along from its front to its rear, up from foot to top."""
        raise NotImplementedError

    def side(self, patch: list[tuple[float, float]], rgb: RGB, ambient: float = 0.5) -> None:
        """The same patch on both sides; corners are (along, up)."""
        self.builder.around(self.centre)
        points = [self.side_point(*corner) for corner in patch]
        for sign in (-1, 1):
            self.builder.face([(x, sign * half, z) for x, half, z in points], rgb, ambient)

    def side_span(self, along: tuple, up: tuple, rgb: RGB, ambient: float = 0.5) -> None:
        """A patch between two places along and two heights; cut in four so that it follows the body."""
        xs = np.linspace(along[0], along[1], 5)
        lower, upper = [(a, up[0]) for a in xs], [(a, up[1]) for a in xs[::-1]]
        self.side(lower + upper, rgb, ambient)


class LowerBody(Solid):
    """Wheels to window line: width and height change along x."""

    BUMPER, FRONT, BONNET, DECK, BOOT, REAR, REAR_BUMPER = range(7)

    def side_point(self, along, up):
        x = self.x.max() + (self.x.min() - self.x.max()) * along
        order = slice(2, -2)  # without bumpers and feet, x falls from one profile point to the next
        top = np.interp(-x, -self.x[order], self.z[order])
        half = np.interp(-x, -self.x[order], self.half[order])
        return x, half, self.z[0] + (top - self.z[0]) * up


class UpperBody(Solid):
    """Window line to roof: four profile points, width changes with height."""

    SCREEN, ROOF, BACK = range(3)

    def side_point(self, along, up):
        front = self.x[0] + (self.x[1] - self.x[0]) * up
        rear = self.x[3] + (self.x[2] - self.x[3]) * up
        half = self.half[0] + (self.half[1] - self.half[0]) * up
        return front + (rear - front) * along, half, self.z[0] + (self.z[1] - self.z[0]) * up
