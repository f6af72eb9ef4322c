"""The attribute reader: analysis by synthesis. It draws what could be there and says what fits, from pixels alone.

A pixel is explained by a character (drawn, within a few pixels of its place) or by the background, which is free:
whatever lies beside the character in the same row, or, at a price, anything at all. A candidate's *gain* is what
the character explains better than the background does; its *confidence* is that gain over what a perfect drawing
on this background would gain. Prices are squared distances, mean over the channels, of RGB in [0, 1].
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from cinema.toyworld.draw import Camera, Paper, draw_character
from cinema.toyworld.world import PLACES, POSITIONS, SIZES, Actor, Look, Setup, all_looks

HEIGHT = 128  # pixels that every frame is read at
REACH = 4  # pixels by which a character may stand beside its mark
ANYTHING = 0.03  # price of a background pixel unlike its row
WRONG = 0.06  # highest price of a pixel that a character should explain
THERE = 0.4  # least confidence of a character that is there
FINALISTS = 24

Array = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class ReadActor:
    """A character that was found.

    Attributes:
        look: the look that fits best.
        confidence: 1 is a perfect drawing, THERE the least that counts.
        offset: (x, y) from its mark, in pixels of a frame 128 high.
    """

    look: Look
    confidence: float
    offset: tuple[int, int]


@dataclass(frozen=True)
class ReadFrame:
    """What a frame shows.

    Attributes:
        place: kind of set, by the colours of sky and ground.
        size: shot size, by the characters' height; None where nobody is.
        found: position → character; positions where nobody is are left out.
        setup: what the frame is supposed to show.
    """

    place: str
    size: str | None
    found: dict[str, ReadActor]
    setup: Setup

    def actor(self, tag: str) -> ReadActor | None:
        """Who really stands where the caption puts this character; None if nobody does."""
        return next((self.found.get(a.position) for a in self.setup.actors if a.tag == tag), None)


def cut_out(
    look: Look, actor: Actor, size: str, camera: Camera | None = None, height: int = HEIGHT, time: float = 0.0, aspect: int = 2
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """A character without its set: RGB times alpha, and alpha, both in [0, 1]; shadows are black with alpha 0.24."""
    sheets = []
    for ground in ((0, 0, 0), (255, 255, 255)):
        paper = Paper(height, aspect * height, ground)
        paper.camera = camera or Camera()
        draw_character(paper, look, actor, size, time)
        sheets.append(np.asarray(paper.picture(), np.float32) / 255)
    return sheets[0], 1 - (sheets[1] - sheets[0]).mean(-1)


def read_keyframe(image: Image.Image, setup: Setup) -> ReadFrame:
    """Read a keyframe that is supposed to show `setup`; neither looks nor anything else of it is taken on trust.

    Args:
        image: a picture of any size, 2:1; characters are at rest, as in the first frame of every shot.
        setup: who should be where; used only to say which tag stands at which position.
    """
    scene = _Scene.of(image)
    cast = {size: {p: a for p in POSITIONS if (a := scene.find(size, p))} for size in SIZES}
    size = max(SIZES, key=lambda s: sum(gain for _, gain in cast[s].values()))
    found = {position: actor for position, (actor, _) in cast[size].items()}
    return ReadFrame(read_place(scene.pixels), size if found else None, found, setup)


def read_place(pixels: Float[np.ndarray, "h w 3"]) -> str:
    """The kind of set whose sky and ground are nearest to the frame's highest and lowest rows."""
    band = max(1, len(pixels) // 16)
    seen = np.concatenate([np.median(pixels[rows], (0, 1)) for rows in (slice(0, band), slice(-band, None))])
    palettes = {name: np.array([*sky, *ground]) / 255 for name, (sky, _, ground) in PLACES.items()}
    return min(palettes, key=lambda name: float(np.abs(palettes[name] - seen).sum()))


@dataclass(frozen=True)
class _Templates:
    """Every look at one size: crops of `cut_out` at the left mark, whose top left pixel is at `corner` (y, x)."""

    colour: np.ndarray  # uint8, (looks, h, w, 3), times alpha
    alpha: np.ndarray  # uint8, (looks, h, w)
    corner: tuple[int, int]
    linear: Array  # (looks, 4 * h/2 * w/2): what multiplies (colours, squares) of a window at half resolution
    constant: Array  # (looks,)


@lru_cache(maxsize=len(SIZES))
def _templates(size: str) -> _Templates:
    sheets = [cut_out(look, Actor("", "left", "standing"), size, aspect=1) for look in all_looks()]
    colour, alpha = (np.round(np.stack(x) * 255).astype(np.uint8) for x in zip(*sheets, strict=True))
    rows, columns = (np.flatnonzero((alpha > 4).any((0, axis))) for axis in (2, 1))
    (top, bottom), (left, right) = ((x[0] // 2 * 2, x[-1] // 2 * 2 + 2) for x in (rows, columns))
    colour, alpha = colour[:, top:bottom, left:right], alpha[:, top:bottom, left:right]
    c, a = _half(colour / np.float32(255)), _half(alpha[..., None] / np.float32(255))
    linear = np.concatenate([2 / 3 * c, -a], -1).reshape(len(c), -1)
    constant = (ANYTHING * a - (c**2).mean(-1, keepdims=True) / np.maximum(a, 1e-3)).sum((1, 2, 3))
    return _Templates(colour, alpha, (int(top), int(left)), linear, constant)


def _half(x: Array) -> Array:
    """Means of 2 x 2 pixels, of (..., h, w, channels)."""
    return (x[..., ::2, ::2, :] + x[..., 1::2, ::2, :] + x[..., ::2, 1::2, :] + x[..., 1::2, 1::2, :]) / 4


@dataclass(frozen=True)
class _Scene:
    """A frame, padded by REACH, with the best guess of its background."""

    pixels: Array  # (h, w, 3), not padded
    padded: Array
    ground: Array
    small: Array  # (h/2, w/2, 4): colours and mean square, padded

    @classmethod
    def of(cls, image: Image.Image) -> "_Scene":
        pixels = to_pixels(image)
        x = np.arange(pixels.shape[1])
        beside = np.min([np.abs(x - p * HEIGHT) for p in POSITIONS.values()], 0) > HEIGHT // 5
        ground = np.broadcast_to(np.median(pixels[:, beside], 1, keepdims=True), pixels.shape)
        padded, ground = (np.pad(a, ((REACH, REACH), (REACH, REACH), (0, 0)), "edge") for a in (pixels, ground))
        small = _half(padded)
        small = np.concatenate([small, (small**2).mean(-1, keepdims=True)], -1)
        return cls(pixels, padded, ground, small)

    def find(self, size: str, position: str) -> tuple[ReadActor, float] | None:
        """The character of this size at this position and its gain, or None."""
        t = _templates(size)
        at = t.corner[0], t.corner[1] + round((POSITIONS[position] - POSITIONS["left"]) * HEIGHT)
        n, (h, w) = REACH + 1, t.alpha.shape[1:]
        windows = sliding_window_view(self.small, (h // 2, w // 2), (0, 1))
        near = windows[at[0] // 2 : at[0] // 2 + n, at[1] // 2 : at[1] // 2 + n]
        near = np.moveaxis(near, 2, -1).reshape(n * n, -1)
        rough = t.linear @ near.T + t.constant[:, None]
        looks = np.argsort(-rough.max(1))[:FINALISTS]
        shifts = [(2 * (k // n), 2 * (k % n)) for k in rough[looks].argmax(1)]
        best = max((*self._fit(t, at, look, s), look, s) for look, s in zip(looks, shifts))
        for _ in range(1):
            around = [(best[3][0] + dy, best[3][1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            around = [s for s in around if min(s) >= 0 and max(s) <= 2 * REACH]
            cand = sorted(((*self._fit(t, at, look, s), look, s) for look, s in zip(looks, shifts)), reverse=True)[:3]
            best = max((*self._fit(t, at, c[2], s), c[2], s) for c in cand for s in around)
        gain, confidence, look, (y, x) = best
        if confidence < THERE:
            return None
        return ReadActor(all_looks()[look], float(confidence), (x - REACH, y - REACH)), float(gain)

    def _fit(self, t, at, look, shift):
        h, w = t.alpha.shape[1:]
        y, x = at[0] + shift[0], at[1] + shift[1]
        pix, bg = self.padded[y : y + h, x : x + w], self.ground[y : y + h, x : x + w]
        a, c = t.alpha[look] / np.float32(255), t.colour[look] / np.float32(255)
        drawn = c + (1 - a[..., None]) * bg
        free = np.minimum(((pix - bg) ** 2).mean(-1), ANYTHING)
        wrong = np.minimum(((pix - drawn) ** 2).mean(-1), WRONG)
        possible = np.minimum(((drawn - bg) ** 2).mean(-1), ANYTHING)
        gain = (a * (free - wrong)).sum()
        return gain, gain / max((a * possible).sum(), 1e-6)


def to_pixels(image: Image.Image) -> Float[np.ndarray, "h w 3"]:
    """A picture → RGB in [0, 1] at the size that is read."""
    image = image.convert("RGB").resize((2 * HEIGHT, HEIGHT), Image.Resampling.BOX if image.height > HEIGHT else Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / 255
