"""Drawing the toy world: layered cut paper, from facts to pixels, at any resolution and any moment of a shot.

Coordinates are in frame heights: x from 0 to 2, y from 0 at the top to 1 at the bottom. Everything is a polygon,
so camera and actions are affine maps of points, exact at every size. A piece of paper throws one soft, flat shadow.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cinema.toyworld.world import COLOURS, POSITIONS, SIZES, Actor, Look, Movie, SetDesign, Setup

Points = NDArray[np.float64]
RGB = tuple[int, int, int]

INK = (38, 34, 44)
HAT_COLOURS: dict[str, RGB] = {
    "cone": (92, 62, 158),
    "tophat": (40, 38, 46),
    "crown": (250, 200, 50),
    "bow": (228, 48, 96),
}
BASELINE = {"wide": 0.93, "medium": 0.95, "close": 1.03}  # where feet stand
ZOOM = {"wide": 1.0, "medium": 1.3, "close": 1.7}  # how near the set is
SHADOW = (20, 16, 40, 60)


@dataclass(frozen=True)
class Camera:
    """Where the camera is: the set's zoom about (1, horizon), the frame's own zoom about its centre, and a shift."""

    zoom: float = 1.0
    push: float = 1.0
    shift: float = 0.0


class Paper:
    """A sheet to glue polygons on; supersampled, so that edges are smooth."""

    def __init__(self, height: int, width: int, colour: RGB, supersample: int = 2) -> None:
        self.scale, self.supersample = height * supersample, supersample
        self.image = Image.new("RGB", (width * supersample, height * supersample), colour)
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.camera = Camera()

    def glue(self, points: Points, colour: RGB, shadow: float = 0.0, zoom_about: float | None = None) -> None:
        """Glue a polygon, points (n, 2) in frame heights; `shadow` is its height above the sheet."""
        points = self._project(points, zoom_about)
        if shadow:
            self.draw.polygon([tuple(p) for p in points + shadow * self.scale], fill=SHADOW)
        self.draw.polygon([tuple(p) for p in points], fill=colour)

    def _project(self, points: Points, zoom_about: float | None) -> Points:
        c = self.camera
        if zoom_about is not None:  # a piece of the set: nearer when the shot is closer
            centre = np.array([1.0, zoom_about])
            points = (points - centre) * c.zoom + centre
            points = points + np.array([c.shift * 0.6, 0.0])  # parallax
        else:
            points = points + np.array([c.shift, 0.0])
        centre = np.array([1.0, 0.55])
        return ((points - centre) * c.push + centre) * self.scale

    def picture(self) -> Image.Image:
        """The finished sheet at its real size."""
        return self.image.reduce(self.supersample)


def render(movie: Movie, setup: Setup, height: int = 128, time: float = 0.0, supersample: int = 2) -> Image.Image:
    """Draw one moment of a shot.

    Args:
        height: pixels; the width is twice that.
        time: share of the shot that has passed, 0 to 1; 0 is the keyframe.
    """
    return render_looks(movie.sets[setup.place], setup, movie.cast, height, time, supersample)


def render_looks(
    design: SetDesign, setup: Setup, cast: dict[str, Look], height: int = 128, time: float = 0.0, supersample: int = 2
) -> Image.Image:
    """Draw one moment of a shot from its parts; see `render`."""
    paper = Paper(height, 2 * height, design.sky, supersample)
    paper.camera = camera_at(setup, time)
    draw_set(paper, design)
    for actor in sorted(setup.actors, key=lambda a: POSITIONS[a.position]):
        draw_character(paper, cast[actor.tag], actor, setup.size, time)
    return paper.picture()


def camera_at(setup: Setup, time: float) -> Camera:
    """The camera at a moment of the shot; every move starts from the keyframe's framing."""
    ease = time * time * (3 - 2 * time)
    base = Camera(zoom=ZOOM[setup.size])
    if setup.camera == "push in":
        return replace(base, push=1 + 0.22 * ease)
    return replace(base, shift={"pan left": 0.24, "pan right": -0.24}.get(setup.camera, 0.0) * ease)


# --- sets -----------------------------------------------------------------------------------------------------


def draw_set(paper: Paper, design: SetDesign) -> None:
    """Sky, sun, far layer, ground and props."""
    h = design.horizon
    sun = (236, 234, 240) if design.place == "night" else (252, 236, 150)
    paper.glue(ellipse(*design.sun, 0.085, 0.085), sun, zoom_about=h)
    paper.glue(_ridge(design), design.far, zoom_about=h)
    paper.glue(box(-1.5, h, 3.5, 3.0), design.ground, zoom_about=h)
    for x, size, variant in design.props:
        PROPS[design.place](paper, design, x, size, variant)


def _ridge(design: SetDesign) -> Points:
    x = np.linspace(-1.5, 3.5, 60)
    phase, height = design.hills
    if design.place in ("city", "beach"):  # a skyline of blocks; the sea is flat
        y = np.round(np.sin(3 * x + phase) * 2) / 2 if design.place == "city" else np.ones_like(x)
        step = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
        x, y = step
    else:
        y = np.sin(2.2 * x + phase) + 0.4 * np.sin(5.1 * x + 2 * phase)
    top = np.stack([x, design.horizon - height * (1.0 + 0.6 * y)], 1)
    return np.concatenate([top, [[3.5, design.horizon + 0.02], [-1.5, design.horizon + 0.02]]])


def _tree(paper: Paper, design: SetDesign, x: float, size: float, variant: float) -> None:
    h, snow = design.horizon, design.place == "snow"
    leaf = (226, 236, 244) if snow else shade((44, 112, 66), 0.85 + 0.4 * variant)
    paper.glue(box(x - 0.06 * size, h - 0.3 * size, x + 0.06 * size, h + 0.08), (98, 68, 46), 0.008, h)
    for k in range(2):
        low, half = h - (0.2 + 0.35 * k) * size, (0.36 - 0.08 * k) * size
        tip = low - 0.62 * size
        paper.glue(np.array([[x - half, low], [x, tip], [x + half, low]]), leaf, 0.008, h)


def _cactus(paper: Paper, design: SetDesign, x: float, size: float, variant: float) -> None:
    h, green, side = design.horizon, shade((66, 138, 84), 0.85 + 0.3 * variant), 1 if variant < 0.5 else -1
    top, arm = h - 0.75 * size, h - 0.45 * size
    paper.glue(capsule(x, top, x, h + 0.05, 0.085 * size), green, 0.008, h)
    paper.glue(capsule(x, arm, x + side * 0.28 * size, arm, 0.06 * size), green, 0.0, h)
    paper.glue(
        capsule(x + side * 0.28 * size, arm - 0.22 * size, x + side * 0.28 * size, arm, 0.06 * size), green, 0.0, h
    )


def _house(paper: Paper, design: SetDesign, x: float, size: float, variant: float) -> None:
    h, night = design.horizon, design.place == "night"
    wall = shade((74, 78, 122) if night else (112, 116, 144), 0.8 + 0.4 * variant)
    half, top = 0.26 * size, h - (0.7 + 0.4 * variant) * size
    paper.glue(box(x - half, top, x + half, h + 0.03), wall, 0.008, h)
    if night:
        paper.glue(
            np.array([[x - 1.2 * half, top], [x, top - 0.25 * size], [x + 1.2 * half, top]]), (120, 60, 80), 0.006, h
        )
    for row in range(2):
        for column in (-0.5, 0.5):
            cx, cy = x + column * half, top + (0.2 + 0.3 * row) * size
            paper.glue(
                box(cx - 0.06 * size, cy - 0.07 * size, cx + 0.06 * size, cy + 0.07 * size), (250, 226, 130), 0.0, h
            )


def _parasol(paper: Paper, design: SetDesign, x: float, size: float, variant: float) -> None:
    h = design.horizon
    red, foot, top = ((226, 92, 80) if variant < 0.5 else (250, 170, 60)), h + 0.10 + 0.06 * variant, h - 0.5 * size
    paper.glue(box(x - 0.02 * size, top, x + 0.02 * size, foot), (150, 110, 76), 0.006, h)
    paper.glue(arc(x, top + 0.14 * size, 0.38 * size, 0.3 * size), red, 0.008, h)
    paper.glue(arc(x, top + 0.14 * size, 0.13 * size, 0.3 * size), (252, 244, 232), 0.0, h)


PROPS = {"forest": _tree, "snow": _tree, "desert": _cactus, "city": _house, "night": _house, "beach": _parasol}


# --- characters -----------------------------------------------------------------------------------------------


def draw_character(paper: Paper, look: Look, actor: Actor, size: str, time: float = 0.0) -> None:
    """Draw a character at its place in the frame, at a moment of its action."""
    height = SIZES[size]
    place, lift, lean, arm = pose(actor.action, time)
    foot = np.array([POSITIONS[actor.position] + place * height, BASELINE[size]])
    turn = np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]])

    def put(points: Points, colour: RGB, shadow: float = 0.0) -> None:
        """Points in body heights, feet at (0, 0), up is negative."""
        paper.glue((points @ turn.T) * height + foot - [0.0, lift * height], colour, shadow)

    colour = COLOURS[look.colour]
    body, top, eye, half = SHAPE_POINTS[look.shape]
    for side in (-1, 1):
        put(ellipse(side * 0.12, -0.015, 0.09, 0.04), INK)
        raised = arm if side > 0 else 0.0
        shoulder, reach = np.array([side * half * 0.9, eye + 0.22]), 0.2
        angle = math.radians(60 - raised * 125) if side > 0 else math.radians(60)
        hand = shoulder + reach * np.array([side * math.cos(angle), math.sin(angle)])
        put(capsule(shoulder[0], shoulder[1], hand[0], hand[1], 0.035), shade(colour, 0.72))
    put(body, shade(colour, 0.62), 0.022)
    put(_inset(body), colour)
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
    beat = math.sin(2 * math.pi * 2 * time)
    if action == "jumping":
        return 0.0, 0.28 * abs(beat), 0.0, 0.0
    if action == "swaying":
        return 0.0, 0.0, 0.22 * beat, 0.0
    if action == "walking":
        return 0.42 * time, 0.035 * abs(math.sin(2 * math.pi * 3 * time)), 0.0, 0.0
    if action == "waving":
        return 0.0, 0.0, 0.0, min(1.0, 6 * time) * (0.75 + 0.25 * math.sin(2 * math.pi * 3 * time))
    return 0.0, 0.0, 0.0, 0.0


def hat_points(hat: str, top: float) -> list[tuple[Points, RGB]]:
    """The pieces of a hat that sits on a head whose top is at `top`."""
    t = top + 0.03
    if hat == "cone":
        return [(np.array([[-0.17, t], [0.0, t - 0.36], [0.17, t]]), HAT_COLOURS["cone"])]
    if hat == "tophat":
        brim, tube = box(-0.22, t - 0.05, 0.22, t), box(-0.14, t - 0.28, 0.14, t - 0.04)
        return [(tube, HAT_COLOURS["tophat"]), (brim, HAT_COLOURS["tophat"])]
    if hat == "crown":
        x = [-0.17, -0.21, -0.09, 0.0, 0.09, 0.21, 0.17]
        y = [0.0, -0.21, -0.11, -0.25, -0.11, -0.21, 0.0]
        return [(np.stack([x, np.array(y) + t], 1), HAT_COLOURS["crown"])]
    if hat == "bow":
        wings = [np.array([[0.0, t - 0.06], [s * 0.22, t - 0.18], [s * 0.22, t + 0.05]]) for s in (-1, 1)]
        return [
            *((w, HAT_COLOURS["bow"]) for w in wings),
            (ellipse(0.0, t - 0.06, 0.05, 0.05), shade(HAT_COLOURS["bow"], 0.7)),
        ]
    return []


# --- geometry -------------------------------------------------------------------------------------------------


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle, (4, 2)."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 36) -> Points:
    """An ellipse, (n, 2)."""
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def arc(x: float, y: float, rx: float, ry: float, n: int = 18) -> Points:
    """The upper half of an ellipse (the lower one for a negative `ry`), (n, 2)."""
    a = np.linspace(np.pi, 2 * np.pi, n)
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def capsule(x0: float, y0: float, x1: float, y1: float, r: float, n: int = 10) -> Points:
    """A line with round ends, (2n, 2)."""
    a = math.atan2(y1 - y0, x1 - x0)
    turn = np.linspace(np.pi / 2, 3 * np.pi / 2, n) + a
    start = np.stack([x0 + r * np.cos(turn), y0 + r * np.sin(turn)], 1)
    end = np.stack([x1 - r * np.cos(turn), y1 - r * np.sin(turn)], 1)
    return np.concatenate([start, end])


def shade(colour: RGB, factor: float) -> RGB:
    """The colour, darker (factor < 1) or lighter."""
    r, g, b = (max(0, min(255, round(v * factor))) for v in colour)
    return r, g, b


def _inset(points: Points, share: float = 0.93) -> Points:
    centre = (points.min(0) + points.max(0)) / 2
    return (points - centre) * share + centre


SHAPE_POINTS: dict[
    str, tuple[Points, float, float, float]
] = {  # outline, top of the head, eyes, half width at the arms
    "round": (ellipse(0.0, -0.44, 0.44, 0.44), -0.87, -0.50, 0.42),
    "square": (box(-0.37, -0.78, 0.37, 0.0), -0.78, -0.50, 0.37),
    "triangle": (np.array([[0.0, -0.98], [-0.5, 0.0], [0.5, 0.0]]), -0.90, -0.36, 0.38),
    "tall": (capsule(0.0, -0.76, 0.0, -0.22, 0.24, 20), -0.98, -0.68, 0.22),
    "diamond": (np.array([[0.0, -0.98], [-0.44, -0.49], [0.0, 0.0], [0.44, -0.49]]), -0.90, -0.52, 0.32),
    "pear": (
        np.concatenate([arc(0.0, -0.30, 0.43, -0.30), arc(0.0, -0.70, 0.27, 0.28)[::-1]]),
        -0.96,
        -0.68,
        0.38,
    ),
}
