"""Drawing the toy world: layered cut paper, from facts to pixels, at any resolution and any moment of a shot.

Coordinates are in frame heights: x from 0 to 2, y from 0 at the top to 1 at the bottom. Everything is a polygon,
so camera and actions are affine maps of points, exact at every size."""

import math
from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cinema.toyworld.world import COLOURS, POSITIONS, RGB, SIZES, Actor, Look, Movie, SetDesign, Setup, clamp

Points = NDArray[np.float64]
Piece = tuple[Points, RGB, float]  # a polygon (n, 2), its colour, and its height above the sheet, for its shadow

INK = (38, 34, 44)
BASELINE = {"wide": 0.93, "medium": 0.95, "close": 1.03}  # where feet stand
ZOOM = {"wide": 1.0, "medium": 1.3, "close": 1.7}  # how near the set is
SHADOW = (20, 16, 40, 60)
PARALLAX = 0.6  # of what the characters move, the set does


def render(movie: Movie, setup: Setup, height: int = 128, time: float = 0.0) -> Image.Image:
    """Draw a shot, `height` pixels high and twice as wide, after a share `time` of it; 0 is the keyframe."""
    return render_looks(movie.sets[setup.place], setup, movie.cast, height, time)


def render_looks(
    design: SetDesign, setup: Setup, cast: dict[str, Look], height: int = 128, time: float = 0.0
) -> Image.Image:
    """Draw one moment of a shot from its parts; see `render`."""
    pieces = [*filmed(scenery(design), setup, time, design.horizon)]
    for actor in sorted(setup.actors, key=lambda a: POSITIONS[a.position]):
        pieces += filmed(character(cast[actor.tag], actor, setup.size, time), setup, time)
    return glue(pieces, design.sky, height)


def glue(pieces: Iterable[Piece], colour: RGB, height: int, aspect: int = 2) -> Image.Image:
    """Glue pieces on a sheet of this colour, drawn at twice its size, so that edges are smooth."""
    scale = 2 * height
    image = Image.new("RGB", (aspect * scale, scale), colour)
    draw = ImageDraw.Draw(image, "RGBA")
    for points, tint, shadow in pieces:
        if shadow:
            draw.polygon([tuple(p) for p in points * scale + shadow * scale], fill=SHADOW)
        draw.polygon([tuple(p) for p in points * scale], fill=tint)
    return image.reduce(2)


def filmed(pieces: Iterable[Piece], setup: Setup, time: float, horizon: float | None = None) -> Iterator[Piece]:
    """Pieces as the camera sees them; those of the set have a horizon, and are nearer when the shot is closer."""
    push, shift = camera_at(setup, time)
    centre, moved = np.array([1.0, 0.55]), np.array([shift * (1.0 if horizon is None else PARALLAX), 0.0])
    for points, colour, shadow in pieces:
        if horizon is not None:
            vanishing = np.array([1.0, horizon])
            points = (points - vanishing) * ZOOM[setup.size] + vanishing
        yield (points + moved - centre) * push + centre, colour, shadow


def camera_at(setup: Setup, time: float) -> tuple[float, float]:
    """The frame's zoom about its centre and its shift; every move starts from the keyframe's framing."""
    ease = time * time * (3 - 2 * time)
    push = 1 + 0.22 * ease if setup.camera == "push in" else 1.0
    return push, {"pan left": 0.24, "pan right": -0.24}.get(setup.camera, 0.0) * ease


def scenery(design: SetDesign) -> Iterator[Piece]:
    """Sun, far layer, ground and props of a set, in frame heights."""
    h, (phase, height), x = design.horizon, design.hills, np.linspace(-1.5, 3.5, 60)
    if design.place in ("city", "beach"):  # a skyline of blocks; the sea is flat
        y = np.round(np.sin(3 * x + phase) * 2) / 2 if design.place == "city" else np.ones_like(x)
        x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
    else:
        y = np.sin(2.2 * x + phase) + 0.4 * np.sin(5.1 * x + 2 * phase)
    top = np.stack([x, h - height * (1.0 + 0.6 * y)], 1)
    yield ellipse(*design.sun, 0.085, 0.085), (236, 234, 240) if design.place == "night" else (252, 236, 150), 0.0
    yield np.concatenate([top, [[3.5, h + 0.02], [-1.5, h + 0.02]]]), design.far, 0.0
    yield box(-1.5, h, 3.5, 3.0), design.ground, 0.0
    for prop in design.props:
        yield from _prop(design.place, h, *prop)


def _prop(place: str, h: float, x: float, size: float, variant: float) -> Iterator[Piece]:
    """A tree, cactus, house or parasol, as the place has them, at x on the horizon h."""
    if place in ("forest", "snow"):
        leaf = (226, 236, 244) if place == "snow" else clamp(v * (0.85 + 0.4 * variant) for v in (44, 112, 66))
        yield box(x - 0.06 * size, h - 0.3 * size, x + 0.06 * size, h + 0.08), (98, 68, 46), 0.008
        for k in range(2):
            low, half = h - (0.2 + 0.35 * k) * size, (0.36 - 0.08 * k) * size
            yield np.array([[x - half, low], [x, low - 0.62 * size], [x + half, low]]), leaf, 0.008
    elif place == "desert":
        green, top, arm = clamp(v * (0.85 + 0.3 * variant) for v in (66, 138, 84)), h - 0.75 * size, h - 0.45 * size
        end = x + (1 if variant < 0.5 else -1) * 0.28 * size
        yield capsule(x, top, x, h + 0.05, 0.085 * size), green, 0.008
        yield capsule(x, arm, end, arm, 0.06 * size), green, 0.0
        yield capsule(end, arm - 0.22 * size, end, arm, 0.06 * size), green, 0.0
    elif place == "beach":
        red, top = (226, 92, 80) if variant < 0.5 else (250, 170, 60), h - 0.5 * size
        yield box(x - 0.02 * size, top, x + 0.02 * size, h + 0.10 + 0.06 * variant), (150, 110, 76), 0.006
        for half, tint, shadow in ((0.38, red, 0.008), (0.13, (252, 244, 232), 0.0)):
            yield ellipse(x, top + 0.14 * size, half * size, 0.3 * size, UPPER), tint, shadow
    else:
        plaster = (74, 78, 122) if place == "night" else (112, 116, 144)
        half, top = 0.26 * size, h - (0.7 + 0.4 * variant) * size
        yield box(x - half, top, x + half, h + 0.03), clamp(v * (0.8 + 0.4 * variant) for v in plaster), 0.008
        if place == "night":
            roof = np.array([[x - 1.2 * half, top], [x, top - 0.25 * size], [x + 1.2 * half, top]])
            yield roof, (120, 60, 80), 0.006
        for row, column in product(range(2), (-0.5, 0.5)):
            cx, cy, w, tall = x + column * half, top + (0.2 + 0.3 * row) * size, 0.06 * size, 0.07 * size
            yield box(cx - w, cy - tall, cx + w, cy + tall), (250, 226, 130), 0.0


def character(look: Look, actor: Actor, size: str, time: float = 0.0) -> Iterator[Piece]:
    """A character at its place in the frame, in frame heights, at a moment of its action.

    Every action starts at rest, so a keyframe does not give it away: the caption must.
    """
    beat, quick = math.sin(2 * math.pi * 2 * time), math.sin(2 * math.pi * 3 * time)
    walked = 0.42 * time if actor.action == "walking" else 0.0  # in body heights, as the lift is
    lift = {"jumping": 0.28 * abs(beat), "walking": 0.035 * abs(quick)}.get(actor.action, 0.0)
    lean = 0.22 * beat if actor.action == "swaying" else 0.0
    raised = min(1.0, 6 * time) * (0.75 + 0.25 * quick) if actor.action == "waving" else 0.0
    height, turn = SIZES[size], np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]])
    foot = np.array([POSITIONS[actor.position] + walked * height, BASELINE[size]])
    for points, colour, shadow in figure(look, raised):
        yield (points @ turn.T) * height + foot - [0.0, lift * height], colour, shadow


def figure(look: Look, raised: float) -> Iterator[Piece]:
    """A character in body heights, feet at (0, 0), up is negative; one arm is `raised` from 0 to 1."""
    colour, (body, top, eye, half) = COLOURS[look.colour], SHAPE_POINTS[look.shape]
    for side, up in ((-1, 0.0), (1, raised)):
        yield ellipse(side * 0.12, -0.015, 0.09, 0.04), INK, 0.0
        x, y, angle = side * half * 0.9, eye + 0.22, math.radians(60 - up * 125)
        hand = x + 0.2 * (side * math.cos(angle)), y + 0.2 * math.sin(angle)
        yield capsule(x, y, *hand, 0.035), clamp(v * 0.72 for v in colour), 0.0
    yield body, clamp(v * 0.62 for v in colour), 0.022
    middle = (body.min(0) + body.max(0)) / 2
    yield (body - middle) * 0.93 + middle, colour, 0.0
    for side in (-1, 1):
        yield ellipse(side * 0.11, eye, 0.066, 0.074), (255, 255, 255), 0.0
        yield ellipse(side * 0.11 + 0.012, eye + 0.01, 0.034, 0.042), INK, 0.0
    yield ellipse(0.0, eye + 0.11, 0.06, -0.05, UPPER), INK, 0.0
    tint, pieces = HAT_POINTS[look.hat]
    brim = np.array([0.0, top + 0.03])
    yield from ((points + brim, tint, 0.012) for points in pieces)
    if look.hat == "bow":
        yield ellipse(0.0, brim[1] - 0.06, 0.05, 0.05), clamp(v * 0.7 for v in tint), 0.012


WHOLE, UPPER = np.linspace(0, 2 * np.pi, 36, endpoint=False), np.linspace(np.pi, 2 * np.pi, 18)


def ellipse(x: float, y: float, rx: float, ry: float, angles: Points = WHOLE) -> Points:
    """The points of an ellipse at these angles, (n) to (n, 2); a negative `ry` makes the upper half the lower one."""
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle, (4, 2)."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def capsule(x0: float, y0: float, x1: float, y1: float, r: float, n: int = 10) -> Points:
    """A line with round ends, (2n, 2)."""
    turn = np.linspace(np.pi / 2, 3 * np.pi / 2, n) + math.atan2(y1 - y0, x1 - x0)
    return np.concatenate([ellipse(x0, y0, r, r, turn), ellipse(x1, y1, -r, -r, turn)])


BELLY, HEAD = ellipse(0.0, -0.30, 0.43, -0.30, UPPER), ellipse(0.0, -0.70, 0.27, 0.28, UPPER)
CROWN = np.array([[-0.17, 0], [-0.21, -0.21], [-0.09, -0.11], [0, -0.25], [0.09, -0.11], [0.21, -0.21], [0.17, 0]])
SHAPE_POINTS = {  # outline, top of the head, eyes, half width at the arms
    "round": (ellipse(0.0, -0.44, 0.44, 0.44), -0.87, -0.50, 0.42),
    "square": (box(-0.37, -0.78, 0.37, 0.0), -0.78, -0.50, 0.37),
    "triangle": (np.array([[0.0, -0.98], [-0.5, 0.0], [0.5, 0.0]]), -0.90, -0.36, 0.38),
    "tall": (capsule(0.0, -0.76, 0.0, -0.22, 0.24, 20), -0.98, -0.68, 0.22),
    "diamond": (np.array([[0.0, -0.98], [-0.44, -0.49], [0.0, 0.0], [0.44, -0.49]]), -0.90, -0.52, 0.32),
    "pear": (np.concatenate([BELLY, HEAD[::-1]]), -0.96, -0.68, 0.38),
}
HAT_POINTS: dict[str, tuple[RGB, list[Points]]] = {  # colour, and pieces whose brim is at 0
    "bare": (INK, []),
    "cone": ((92, 62, 158), [np.array([[-0.17, 0.0], [0.0, -0.36], [0.17, 0.0]])]),
    "tophat": ((40, 38, 46), [box(-0.14, -0.28, 0.14, -0.04), box(-0.22, -0.05, 0.22, 0.0)]),
    "crown": ((250, 200, 50), [CROWN]),
    "bow": ((228, 48, 96), [np.array([[0.0, -0.06], [x, -0.18], [x, 0.05]]) for x in (-0.22, 0.22)]),
}
