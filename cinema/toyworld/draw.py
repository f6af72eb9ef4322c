"""Drawing the toy world: layered cut paper, from facts to pixels, at any resolution and any moment of a shot.

Coordinates are in frame heights: x from 0 to 2, y from 0 at the top to 1 at the bottom. Everything is a polygon,
so camera and actions are affine maps of points, exact at every size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cinema.toyworld.world import COLOURS, POSITIONS, RGB, SIZES, Actor, Look, Movie, SetDesign, Setup, clamp

Points = NDArray[np.float64]
Put = Callable[..., None]  # of points, colour and the height above the sheet

INK = (38, 34, 44)
HAT_COLOURS = {"cone": (92, 62, 158), "tophat": (40, 38, 46), "crown": (250, 200, 50), "bow": (228, 48, 96)}
BASELINE = {"wide": 0.93, "medium": 0.95, "close": 1.03}  # where feet stand
ZOOM = {"wide": 1.0, "medium": 1.3, "close": 1.7}  # how near the set is
SHADOW = (20, 16, 40, 60)
PARALLAX = 0.6  # of what the characters move, the set does


@dataclass(frozen=True)
class Camera:
    """Where the camera is: the set's zoom about (1, horizon), the frame's own zoom about its centre, and a shift."""

    zoom: float
    push: float
    shift: float


class Paper:
    """A sheet to glue polygons on, drawn at twice its size, so that edges are smooth."""

    def __init__(self, height: int, colour: RGB, camera: Camera, aspect: int = 2) -> None:
        self.scale, self.camera = 2 * height, camera
        self.image = Image.new("RGB", (aspect * self.scale, self.scale), colour)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def glue(self, points: Points, colour: RGB, shadow: float = 0.0, horizon: float | None = None) -> None:
        """Glue a polygon, points (n, 2); `shadow` is its height above the sheet; pieces of the set have a horizon."""
        camera, centre, parallax = self.camera, np.array([1.0, 0.55]), 1.0
        if horizon is not None:  # nearer when the shot is closer
            vanishing, parallax = np.array([1.0, horizon]), PARALLAX
            points = (points - vanishing) * camera.zoom + vanishing
        shift = np.array([camera.shift * parallax, 0.0])
        points = ((points + shift - centre) * camera.push + centre) * self.scale
        if shadow:
            self.draw.polygon([tuple(p) for p in points + shadow * self.scale], fill=SHADOW)
        self.draw.polygon([tuple(p) for p in points], fill=colour)

    def picture(self) -> Image.Image:
        """The finished sheet at its real size."""
        return self.image.reduce(2)


def render(movie: Movie, setup: Setup, height: int = 128, time: float = 0.0) -> Image.Image:
    """Draw a shot, `height` pixels high and twice as wide, after a share `time` of it; 0 is the keyframe."""
    return render_looks(movie.sets[setup.place], setup, movie.cast, height, time)


def render_looks(
    design: SetDesign, setup: Setup, cast: dict[str, Look], height: int = 128, time: float = 0.0
) -> Image.Image:
    """Draw one moment of a shot from its parts; see `render`."""
    paper = Paper(height, design.sky, camera_at(setup, time))
    draw_set(paper, design)
    for actor in sorted(setup.actors, key=lambda a: POSITIONS[a.position]):
        draw_character(paper, cast[actor.tag], actor, setup.size, time)
    return paper.picture()


def camera_at(setup: Setup, time: float) -> Camera:
    """The camera at a moment of the shot; every move starts from the keyframe's framing."""
    ease = time * time * (3 - 2 * time)
    push = 1 + 0.22 * ease if setup.camera == "push in" else 1.0
    return Camera(ZOOM[setup.size], push, {"pan left": 0.24, "pan right": -0.24}.get(setup.camera, 0.0) * ease)


def draw_set(paper: Paper, design: SetDesign) -> None:
    """Sky, sun, far layer, ground and props."""

    def put(points: Points, colour: RGB, shadow: float = 0.0) -> None:
        paper.glue(points, colour, shadow, design.horizon)

    put(ellipse(*design.sun, 0.085, 0.085), (236, 234, 240) if design.place == "night" else (252, 236, 150))
    put(_ridge(design), design.far)
    put(box(-1.5, design.horizon, 3.5, 3.0), design.ground)
    for prop in design.props:
        PROPS[design.place](put, design.place, design.horizon, *prop)


def _ridge(design: SetDesign) -> Points:
    x = np.linspace(-1.5, 3.5, 60)
    phase, height = design.hills
    if design.place in ("city", "beach"):  # a skyline of blocks; the sea is flat
        y = np.round(np.sin(3 * x + phase) * 2) / 2 if design.place == "city" else np.ones_like(x)
        x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
    else:
        y = np.sin(2.2 * x + phase) + 0.4 * np.sin(5.1 * x + 2 * phase)
    top = np.stack([x, design.horizon - height * (1.0 + 0.6 * y)], 1)
    return np.concatenate([top, [[3.5, design.horizon + 0.02], [-1.5, design.horizon + 0.02]]])


def _tree(put: Put, place: str, h: float, x: float, size: float, variant: float) -> None:
    leaf = (226, 236, 244) if place == "snow" else shade((44, 112, 66), 0.85 + 0.4 * variant)
    put(box(x - 0.06 * size, h - 0.3 * size, x + 0.06 * size, h + 0.08), (98, 68, 46), 0.008)
    for k in range(2):
        low, half = h - (0.2 + 0.35 * k) * size, (0.36 - 0.08 * k) * size
        put(np.array([[x - half, low], [x, low - 0.62 * size], [x + half, low]]), leaf, 0.008)


def _cactus(put: Put, place: str, h: float, x: float, size: float, variant: float) -> None:
    green, top, arm = shade((66, 138, 84), 0.85 + 0.3 * variant), h - 0.75 * size, h - 0.45 * size
    end = x + (1 if variant < 0.5 else -1) * 0.28 * size
    put(capsule(x, top, x, h + 0.05, 0.085 * size), green, 0.008)
    put(capsule(x, arm, end, arm, 0.06 * size), green)
    put(capsule(end, arm - 0.22 * size, end, arm, 0.06 * size), green)


def _house(put: Put, place: str, h: float, x: float, size: float, variant: float) -> None:
    wall = shade((74, 78, 122) if place == "night" else (112, 116, 144), 0.8 + 0.4 * variant)
    half, top = 0.26 * size, h - (0.7 + 0.4 * variant) * size
    put(box(x - half, top, x + half, h + 0.03), wall, 0.008)
    if place == "night":
        roof = np.array([[x - 1.2 * half, top], [x, top - 0.25 * size], [x + 1.2 * half, top]])
        put(roof, (120, 60, 80), 0.006)
    for row, column in product(range(2), (-0.5, 0.5)):
        cx, cy, w, tall = x + column * half, top + (0.2 + 0.3 * row) * size, 0.06 * size, 0.07 * size
        put(box(cx - w, cy - tall, cx + w, cy + tall), (250, 226, 130))


def _parasol(put: Put, place: str, h: float, x: float, size: float, variant: float) -> None:
    red, top = (226, 92, 80) if variant < 0.5 else (250, 170, 60), h - 0.5 * size
    put(box(x - 0.02 * size, top, x + 0.02 * size, h + 0.10 + 0.06 * variant), (150, 110, 76), 0.006)
    put(arc(x, top + 0.14 * size, 0.38 * size, 0.3 * size), red, 0.008)
    put(arc(x, top + 0.14 * size, 0.13 * size, 0.3 * size), (252, 244, 232))


PROPS = {"forest": _tree, "snow": _tree, "desert": _cactus, "city": _house, "night": _house, "beach": _parasol}


def draw_character(paper: Paper, look: Look, actor: Actor, size: str, time: float = 0.0) -> None:
    """Draw a character at its place in the frame, at a moment of its action."""
    height, colour, (body, top, eye, half) = SIZES[size], COLOURS[look.colour], SHAPE_POINTS[look.shape]
    place, lift, lean, arm = pose(actor.action, time)
    foot = np.array([POSITIONS[actor.position] + place * height, BASELINE[size]])
    turn = np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]])

    def put(points: Points, colour: RGB, shadow: float = 0.0) -> None:
        """Points in body heights, feet at (0, 0), up is negative."""
        paper.glue((points @ turn.T) * height + foot - [0.0, lift * height], colour, shadow)

    for side, raised in ((-1, 0.0), (1, arm)):
        put(ellipse(side * 0.12, -0.015, 0.09, 0.04), INK)
        x, y, angle = side * half * 0.9, eye + 0.22, math.radians(60 - raised * 125)
        hand = x + 0.2 * (side * math.cos(angle)), y + 0.2 * math.sin(angle)
        put(capsule(x, y, *hand, 0.035), shade(colour, 0.72))
    put(body, shade(colour, 0.62), 0.022)
    middle = (body.min(0) + body.max(0)) / 2
    put((body - middle) * 0.93 + middle, colour)
    for side in (-1, 1):
        put(ellipse(side * 0.11, eye, 0.066, 0.074), (255, 255, 255))
        put(ellipse(side * 0.11 + 0.012, eye + 0.01, 0.034, 0.042), INK)
    put(arc(0.0, eye + 0.11, 0.06, -0.05), INK)
    for points, tint in hat_points(look.hat, top):
        put(points, tint, 0.012)


def pose(action: str, time: float) -> tuple[float, float, float, float]:
    """Place, lift (in body heights), lean (radians) and raised arm (0 to 1) at a moment of an action.

    Every action starts at rest, so a keyframe does not give it away: the caption must.
    """
    beat, quick = math.sin(2 * math.pi * 2 * time), math.sin(2 * math.pi * 3 * time)
    moves = {
        "jumping": (0.0, 0.28 * abs(beat), 0.0, 0.0),
        "swaying": (0.0, 0.0, 0.22 * beat, 0.0),
        "walking": (0.42 * time, 0.035 * abs(quick), 0.0, 0.0),
        "waving": (0.0, 0.0, 0.0, min(1.0, 6 * time) * (0.75 + 0.25 * quick)),
    }
    return moves.get(action, (0.0, 0.0, 0.0, 0.0))


def hat_points(hat: str, top: float) -> list[tuple[Points, RGB]]:
    """The pieces of a hat that sits on a head whose top is at `top`."""
    t, colour = top + 0.03, HAT_COLOURS.get(hat, INK)
    if hat == "cone":
        return [(np.array([[-0.17, t], [0.0, t - 0.36], [0.17, t]]), colour)]
    if hat == "tophat":
        return [(box(-0.14, t - 0.28, 0.14, t - 0.04), colour), (box(-0.22, t - 0.05, 0.22, t), colour)]
    if hat == "crown":
        x, y = [-0.17, -0.21, -0.09, 0.0, 0.09, 0.21, 0.17], [0.0, -0.21, -0.11, -0.25, -0.11, -0.21, 0.0]
        return [(np.stack([x, np.array(y) + t], 1), colour)]
    if hat == "bow":
        wings = [np.array([[0.0, t - 0.06], [x, t - 0.18], [x, t + 0.05]]) for x in (-0.22, 0.22)]
        return [*((wing, colour) for wing in wings), (ellipse(0.0, t - 0.06, 0.05, 0.05), shade(colour, 0.7))]
    return []


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle, (4, 2)."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def around(x: float, y: float, rx: float, ry: float, angles: Points) -> Points:
    """The points of an ellipse at these angles, (n) to (n, 2)."""
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """A whole ellipse, (36, 2)."""
    return around(x, y, rx, ry, np.linspace(0, 2 * np.pi, 36, endpoint=False))


def arc(x: float, y: float, rx: float, ry: float) -> Points:
    """The upper half of an ellipse (the lower one for a negative `ry`), (18, 2)."""
    return around(x, y, rx, ry, np.linspace(np.pi, 2 * np.pi, 18))


def capsule(x0: float, y0: float, x1: float, y1: float, r: float, n: int = 10) -> Points:
    """A line with round ends, (2n, 2)."""
    turn = np.linspace(np.pi / 2, 3 * np.pi / 2, n) + math.atan2(y1 - y0, x1 - x0)
    return np.concatenate([around(x0, y0, r, r, turn), around(x1, y1, -r, -r, turn)])


def shade(colour: RGB, factor: float) -> RGB:
    """The colour, darker (factor < 1) or lighter."""
    return clamp(v * factor for v in colour)


SHAPE_POINTS = {  # outline, top of the head, eyes, half width at the arms
    "round": (ellipse(0.0, -0.44, 0.44, 0.44), -0.87, -0.50, 0.42),
    "square": (box(-0.37, -0.78, 0.37, 0.0), -0.78, -0.50, 0.37),
    "triangle": (np.array([[0.0, -0.98], [-0.5, 0.0], [0.5, 0.0]]), -0.90, -0.36, 0.38),
    "tall": (capsule(0.0, -0.76, 0.0, -0.22, 0.24, 20), -0.98, -0.68, 0.22),
    "diamond": (np.array([[0.0, -0.98], [-0.44, -0.49], [0.0, 0.0], [0.44, -0.49]]), -0.90, -0.52, 0.32),
    "pear": (np.concatenate([arc(0.0, -0.30, 0.43, -0.30), arc(0.0, -0.70, 0.27, 0.28)[::-1]]), -0.96, -0.68, 0.38),
}
