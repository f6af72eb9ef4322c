"""The attribute reader: analysis by synthesis. It draws what could be there and says what fits, from pixels alone.

A pixel is explained by a character (drawn, within a few pixels of its place) or by the background, which is free:
the colours on either side of the character, row by row, or, at a price, anything at all. A candidate's *gain* is what
the character explains better than the background does; its *confidence* is that gain over what a perfect drawing
on this background would gain. Prices are squared distances, mean over the channels, of RGB in [0, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from einops import rearrange, repeat
from jaxtyping import Float, Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from cinema.toyworld.draw import PARALLAX, Paper, camera_at, draw_character
from cinema.toyworld.world import (
    ACTIONS,
    CAMERAS,
    COLOURS,
    HATS,
    PLACES,
    POSITIONS,
    SHAPES,
    SIZES,
    Actor,
    Look,
    Setup,
    all_looks,
)

HEIGHT = 128  # pixels that every frame is read at
REACH = 4  # pixels by which a character may stand beside its mark
MARGIN = 4  # pixels from a silhouette to the background that is beside it for sure
ANYTHING = 0.03  # highest price of a background pixel
WRONG = 0.06  # highest price of a pixel that a character should explain
THERE = 0.1  # least confidence of a character that is there; on empty sets nothing gets above 0
FINALISTS = 16  # looks that are compared at full resolution

Trial = tuple[int, int, int]  # look, and offsets down and across, counted from -REACH


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


@dataclass(frozen=True)
class ReadClip:
    """What a clip shows: the camera's move, and the action of every character whose look was given."""

    camera: str
    actions: dict[str, str]


def cut_out(
    look: Look, setup: Setup, actor: Actor, time: float = 0.0, height: int = HEIGHT, aspect: int = 2
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """A character without its set at a moment of a shot: RGB times alpha, and alpha, in [0, 1].

    Drawn on black and on white; what differs shines through. A shadow is black of alpha 0.24.
    """
    sheets = []
    for ground in ((0, 0, 0), (255, 255, 255)):
        paper = Paper(height, ground, camera_at(setup, time), aspect)
        draw_character(paper, look, actor, setup.size, time)
        sheets.append(np.asarray(paper.picture(), np.float32) / 255)
    return sheets[0], 1 - (sheets[1] - sheets[0]).mean(-1)


def read_keyframe(image: Image.Image, setup: Setup) -> ReadFrame:
    """Read a keyframe that is supposed to show `setup`; neither looks nor anything else of it is taken on trust.

    Args:
        image: a picture of any size, 2:1; characters are at rest, as in the first frame of every shot.
        setup: who should be where; used only to say which tag stands at which position.
    """
    pixels = to_pixels(image)
    scene = _Scene.of(pixels)
    cast = {size: {p: hit for p in POSITIONS if (hit := scene.find(size, p))} for size in SIZES}
    size = max(SIZES, key=lambda s: sum(gain for _, gain in cast[s].values()))
    found = {position: actor for position, (actor, _) in cast[size].items()}
    return ReadFrame(read_place(pixels), size if found else None, found, setup)


def read_place(pixels: Float[np.ndarray, "h w 3"]) -> str:
    """The kind of set whose sky and ground are nearest to the frame's highest and lowest rows."""
    band = max(1, len(pixels) // 16)
    seen = np.concatenate([np.median(pixels[rows], (0, 1)) for rows in (slice(0, band), slice(-band, None))])
    palettes = {name: np.array([*sky, *ground]) / 255 for name, (sky, _, ground) in PLACES.items()}
    return min(palettes, key=lambda name: float(np.abs(palettes[name] - seen).sum()))


@dataclass(frozen=True)
class _Templates:
    """Every look at one size: crops of `cut_out` at the left mark, whose top left pixel is at `corner` (y, x)."""

    colour: UInt8[np.ndarray, "looks h w 3"]  # times alpha
    alpha: UInt8[np.ndarray, "looks h w"]
    edges: Int[np.ndarray, "looks 2 h"]  # of every row: columns MARGIN beyond the silhouette, left and right
    corner: tuple[int, int]
    linear: Float[np.ndarray, "looks values"]  # times (colours, mean squares) of a window at half resolution ...
    constant: Float[np.ndarray, "looks 1"]  # ... plus this: the gain on a background that could be anything


@lru_cache(maxsize=len(SIZES))
def _templates(size: str) -> _Templates:
    bodies = [_cut_outs(shape, hat, size) for shape in SHAPES for hat in HATS]
    colour, alpha = (np.stack(x).astype(np.float32) for x in zip(*bodies, strict=True))
    colour = rearrange(colour, "body tint h w c -> (tint body) h w c")  # the order of all_looks
    alpha = repeat(alpha, "body h w -> (tint body) h w", tint=len(COLOURS))
    rows, columns = (np.flatnonzero((alpha > 0.02).any((0, axis))) for axis in (2, 1))
    (top, bottom), (left, right) = ((x[0] // 2 * 2, x[-1] // 2 * 2 + 2) for x in (rows, columns))
    colour, alpha = colour[:, top:bottom, left:right], alpha[:, top:bottom, left:right]
    c, a = _half(colour), _half(alpha[..., None])
    linear = np.concatenate([2 / 3 * c, -a], -1).reshape(len(c), -1)  # of a (anything - |pixel - c / a|^2)
    constant = (ANYTHING * a - (c**2).mean(-1, keepdims=True) / np.maximum(a, 1e-3)).sum((1, 2))
    stored = [np.round(255 * x).clip(0, 255).astype(np.uint8) for x in (colour, alpha)]
    solid = alpha > 0.02
    ends = solid.argmax(2) - MARGIN, solid.shape[2] - 1 - solid[..., ::-1].argmax(2) + MARGIN
    return _Templates(stored[0], stored[1], np.stack(ends, 1), (int(top), int(left)), linear, constant)


def _cut_outs(shape: str, hat: str, size: str) -> tuple[Float[np.ndarray, "tints h w 3"], Float[np.ndarray, "h w"]]:
    """One body in every colour, from drawings in two: a pixel is some share of the body's colour plus a rest."""
    actor = Actor("", "left", "standing")
    setup, pair = Setup("", size, "static", (actor,)), ("white", "brown")  # the pair that differs most
    (first, alpha), (second, _) = (cut_out(Look(c, shape, hat), setup, actor, aspect=1) for c in pair)
    tints = np.array(list(COLOURS.values())) / 255
    a, b = (np.array(COLOURS[c]) / 255 for c in pair)
    share = (first - second) @ (a - b) / np.square(a - b).sum()
    return first + share[..., None] * (tints - a)[:, None, None], alpha


@dataclass(frozen=True)
class _Scene:
    """A frame, padded by REACH; `small` is half as large: colours and mean square."""

    padded: Float[np.ndarray, "_h _w 3"]
    small: Float[np.ndarray, "_hh _hw 4"]

    @classmethod
    def of(cls, pixels: Float[np.ndarray, "h w 3"]) -> "_Scene":
        padded = np.pad(pixels, ((REACH, REACH), (REACH, REACH), (0, 0)), "edge")
        small = _half(padded)
        return cls(padded, np.concatenate([small, (small**2).mean(-1, keepdims=True)], -1))

    def find(self, size: str, position: str) -> tuple[ReadActor, float] | None:
        """The character of this size at this position and its gain, or None; by all looks, then by the likeliest."""
        t = _templates(size)
        top, left = t.corner[0], t.corner[1] + round((POSITIONS[position] - POSITIONS["left"]) * HEIGHT)
        n, (h, w) = REACH + 1, t.alpha.shape[1:]
        windows = sliding_window_view(self.small, (h // 2, w // 2), (0, 1))[top // 2 :, left // 2 :][:n, :n]
        rough = t.linear @ rearrange(windows, "y x c h w -> (h w c) (y x)") + t.constant
        looks = np.argsort(-rough.max(1))[:FINALISTS]
        trials = [
            (int(look), 2 * (k // n), 2 * (k % n))
            for look, k in zip(looks, rough[looks].argmax(1).tolist(), strict=True)
        ]
        ranked = sorted((self._gain(t, top, left, trial) for trial in trials), reverse=True)
        if ranked[0][1] < THERE / 2:
            return None
        near = {(look, y + dy, x + dx) for *_, (look, y, x) in ranked[:3] for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
        inside = [trial for trial in near if min(trial[1:]) >= 0 and max(trial[1:]) <= 2 * REACH]
        gain, confidence, (look, y, x) = max(self._gain(t, top, left, trial) for trial in inside)
        actor = ReadActor(all_looks()[look], confidence, (x - REACH, y - REACH))
        return (actor, gain) if confidence >= THERE else None

    def _gain(self, t: _Templates, top: int, left: int, trial: Trial) -> tuple[float, float, Trial]:
        """Gain and confidence of one look at one place; on each side of it, its row goes on as it is beyond it."""
        look, y, x = trial
        y, x, (h, w) = top + y, left + x, t.alpha.shape[1:]
        pixels, alpha = self.padded[y : y + h, x : x + w], t.alpha[look] / np.float32(255)
        beyond = [self.padded[range(y, y + h), (x + end).clip(0, self.padded.shape[1] - 1)] for end in t.edges[look]]
        sides = [np.broadcast_to(colour[:, None], pixels.shape) for colour in beyond]
        nearest = np.concatenate([sides[0][:, : w // 2], sides[1][:, w // 2 :]], 1)
        drawn = t.colour[look] / np.float32(255) + (1 - alpha[..., None]) * nearest
        gain = float((alpha * (_free(pixels, sides) - np.minimum(_distance(pixels, drawn), WRONG))).sum())
        return gain, gain / max(float((alpha * _free(drawn, sides)).sum()), 1e-6), trial


def _free(pixels: Float[np.ndarray, "h w 3"], sides: list[Float[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "h w"]:
    """The price of pixels as background, which is like one side or the other, or anything."""
    return np.minimum(np.minimum(_distance(pixels, sides[0]), _distance(pixels, sides[1])), ANYTHING)


# --- clips ----------------------------------------------------------------------------------------------------


def read_clip(frames: Sequence[Image.Image], setup: Setup, cast: Mapping[str, Look]) -> ReadClip:
    """Read a shot: which camera move and which actions, drawn over its moved first frame, explain it best.

    Args:
        frames: the whole shot, evenly spaced in time from 0 to 1; at least 5.
        setup: who stands where, and the shot size; its camera and actions are not looked at.
        cast: tag → look, as read from the first frame; a character of the setup without a look is left out.

    Raises:
        ValueError: fewer than 5 frames.
    """
    if len(frames) < 5:
        raise ValueError(f"{len(frames)} frames show neither a move nor an action; give at least 5")
    chosen = sorted({*range(2, len(frames), 3), len(frames) - 1})
    times = [k / (len(frames) - 1) for k in chosen]
    first, *seen = [to_pixels(frames[k]) for k in (0, *chosen)]
    actors = tuple(actor for actor in setup.actors if actor.tag in cast)
    trials = [replace(setup, actors=actors, camera=camera) for camera in CAMERAS]
    tried = [_explain(first, np.stack(seen), times, trial, cast) for trial in trials]
    return min(tried, key=lambda result: result[0])[1]


def _explain(
    first: Float[np.ndarray, "h w 3"],
    seen: Float[np.ndarray, "t h w 3"],
    times: list[float],
    setup: Setup,
    cast: Mapping[str, Look],
) -> tuple[float, ReadClip]:
    """Given the setup's camera, the actions that explain most, and the mean price of a pixel that is explained."""
    still = replace(setup, camera="static")
    bare = np.ones(first.shape[:2], np.float32)
    for actor in setup.actors:
        bare = bare * (1 - cut_out(cast[actor.tag], still, actor)[1])
    sheet = np.concatenate([first, bare[..., None]], -1)
    moved = np.stack([_moved(sheet, setup, time, PARALLAX) for time in times])
    ground, weight = moved[..., :3], moved[..., 3]
    price = weight * np.minimum(_distance(seen, ground), WRONG)
    actions = {}
    for actor in setup.actors:
        tried = {}
        for action in ACTIONS:
            poses = [_posed(cast[actor.tag], still, replace(actor, action=action), time) for time in times]
            drawn = np.stack([_moved(pose, setup, time, 1.0) for pose, time in zip(poses, times, strict=True)])
            alpha = drawn[..., 3]
            wrong = alpha * np.minimum(_distance(seen, drawn[..., :3] + (1 - drawn[..., 3:]) * ground), WRONG)
            tried[action] = (1 - alpha) * price + wrong, (1 - alpha) * weight + alpha
        best = min(tried, key=lambda action: tried[action][0].sum() / tried[action][1].sum())
        actions[actor.tag], (price, weight) = best, tried[best]
    return float(price.sum() / weight.sum()), ReadClip(setup.camera, actions)


@lru_cache(maxsize=128)  # the poses of one clip are the same for every camera
def _posed(look: Look, setup: Setup, actor: Actor, time: float) -> Float[np.ndarray, "h w 4"]:
    colour, alpha = cut_out(look, setup, actor, time)
    return np.concatenate([colour, alpha[..., None]], -1)


def _moved(sheet: Float[np.ndarray, "h w 4"], setup: Setup, time: float, parallax: float) -> Float[np.ndarray, "h w 4"]:
    """A picture and its alpha as the camera shows them later; what comes from outside has alpha 0."""
    camera = camera_at(setup, time)
    if camera.push == 1 and camera.shift == 0:
        return sheet
    rest = HEIGHT * (1 - 1 / camera.push)  # the frame's zoom is about (1, 0.55)
    affine = (1 / camera.push, 0, rest - parallax * camera.shift * HEIGHT, 0, 1 / camera.push, 0.55 * rest)
    channels = [Image.fromarray(channel) for channel in np.moveaxis(sheet, -1, 0).astype(np.float32)]
    size, how = channels[0].size, (Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.stack([np.asarray(channel.transform(size, *how)) for channel in channels], -1)


def to_pixels(image: Image.Image) -> Float[np.ndarray, "h w 3"]:
    """A picture → RGB in [0, 1] at the size that is read."""
    return np.asarray(image.convert("RGB").resize((2 * HEIGHT, HEIGHT), Image.Resampling.BOX), np.float32) / 255


def _half(x: Float[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b _h _w c"]:
    """Means of 2 x 2 pixels."""
    return (x[..., ::2, ::2, :] + x[..., 1::2, ::2, :] + x[..., ::2, 1::2, :] + x[..., 1::2, 1::2, :]) / 4


def _distance(a: Float[np.ndarray, "*b c"], b: Float[np.ndarray, "*b c"]) -> Float[np.ndarray, "*b"]:
    """Squared distance of pictures, mean over the channels."""
    difference = a - b
    return np.einsum("...c,...c->...", difference, difference) / a.shape[-1]
