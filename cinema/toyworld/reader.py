"""The attribute reader: analysis by synthesis. It draws what could be there and says what fits, from pixels alone.

A character explains a pixel, or the background does: the colours beside the character, row by row, for nothing, or at
a price anything. A candidate's *gain* is what it explains better than the background; its *confidence* is that over
a perfect drawing's gain. Prices are squared distances, mean over the channels, of RGB in [0, 1]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from cinema.toyworld import world
from cinema.toyworld.draw import PARALLAX, camera_at, character, filmed, glue
from cinema.toyworld.world import ACTIONS, CAMERAS, COLOURS, POSITIONS, SIZES, Actor, Look, Setup, all_looks

HEIGHT = 128  # pixels that every frame is read at
REACH = 4  # pixels by which a character may stand beside its mark
MARGIN = 4  # pixels from a silhouette to the background that is beside it for sure
ANYTHING = 0.03  # highest price of a background pixel
WRONG = 0.06  # highest price of a pixel that a character should explain
THERE = 0.1  # least confidence of a character that is there; on empty sets nothing gets above 0
FINALISTS = 16  # looks that are compared at full resolution


@dataclass(frozen=True)
class ReadActor:
    """A character that was found, by the look that fits best; a confidence of 1 is a perfect drawing."""

    look: Look
    confidence: float


@dataclass(frozen=True)
class ReadFrame:
    """What a frame shows, and the `setup` that it is supposed to show."""

    place: str  # kind of set, by the colours of sky and ground
    size: str | None  # by the characters' height; None where nobody is
    found: dict[str, ReadActor]  # by position, without those where nobody is
    setup: Setup

    def actor(self, tag: str) -> ReadActor | None:
        """Who really stands where the caption puts this character; None if nobody does."""
        return next((self.found.get(a.position) for a in self.setup.actors if a.tag == tag), None)


@dataclass(frozen=True)
class ReadClip:
    """What a clip shows: the camera's move, and by tag the action of every character whose look was given."""

    camera: str
    actions: dict[str, str]


def cut_out(
    look: Look, setup: Setup, actor: Actor, time: float = 0.0, height: int = HEIGHT, aspect: int = 2
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """A character without its set at a moment of a shot: RGB times alpha, and alpha, in [0, 1].

    Drawn on black and on white; what differs shines through. A shadow is black of alpha 0.24.
    """
    pieces = [*filmed(character(look, actor, setup.size, time), setup, time)]
    black, white = (np.asarray(glue(pieces, (v, v, v), height, aspect), np.float32) / 255 for v in (0, 255))
    return black, 1 - (white - black).mean(-1)


def read_keyframe(image: Image.Image, setup: Setup) -> ReadFrame:
    """Read a keyframe, 2:1 and of any size, whose characters are at rest, as in the first frame of every shot.

    It is supposed to show `setup`, of which nothing is taken on trust but which tag stands at which position.
    """
    pixels = to_pixels(image)
    padded = np.pad(pixels, ((REACH, REACH), (REACH, REACH), (0, 0)), "edge")
    small = np.dstack([half := _half(padded), (half**2).mean(-1)])
    cast = {size: {p: hit for p in POSITIONS if (hit := _find(padded, small, size, p))} for size in SIZES}
    size, hits = max(cast.items(), key=lambda item: sum(gain for _, gain in item[1].values()))
    found = {position: actor for position, (actor, _) in hits.items()}
    return ReadFrame(read_place(pixels), size if found else None, found, setup)


def read_place(pixels: Float[np.ndarray, "h w 3"]) -> str:
    """The kind of set whose sky and ground are nearest to the frame's highest and lowest rows."""
    band = HEIGHT // 16
    seen = np.concatenate([np.median(rows, (0, 1)) for rows in (pixels[:band], pixels[-band:])])
    palettes = {name: np.array([*sky, *ground]) / 255 for name, (sky, _, ground) in world.PLACES.items()}
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
    bodies = [_cut_outs(shape, hat, size) for shape, hat in product(world.SHAPES, world.HATS)]
    colour, alpha = (np.stack(x).astype(np.float32) for x in zip(*bodies, strict=True))
    rows, columns = (np.flatnonzero((alpha > 0.02).any((0, axis))) // 2 * 2 for axis in (2, 1))
    crop = np.s_[:, rows[0] : rows[-1] + 2, columns[0] : columns[-1] + 2]
    colour = rearrange(colour, "body tint h w c -> (tint body) h w c")[crop]  # the order of all_looks
    alpha = repeat(alpha, "body h w -> (tint body) h w", tint=len(COLOURS))[crop]
    c, a, solid = _half(colour), _half(alpha[..., None]), alpha > 0.02
    linear = np.concatenate([2 / 3 * c, -a], -1).reshape(len(c), -1)  # of a (anything - |pixel - c / a|^2)
    constant = (ANYTHING * a - (c**2).mean(-1, keepdims=True) / np.maximum(a, 1e-3)).sum((1, 2))
    stored = [np.round(255 * x).clip(0, 255).astype(np.uint8) for x in (colour, alpha)]
    ends = solid.argmax(2) - MARGIN, solid.shape[2] - 1 - solid[..., ::-1].argmax(2) + MARGIN
    return _Templates(stored[0], stored[1], np.stack(ends, 1), (int(rows[0]), int(columns[0])), linear, constant)


def _cut_outs(shape: str, hat: str, size: str) -> tuple[Float[np.ndarray, "tints h w 3"], Float[np.ndarray, "h w"]]:
    """One body in every colour, from drawings in two: a pixel is some share of the body's colour plus a rest."""
    actor = Actor("", "left", "standing")
    setup, pair = Setup("", size, "static", (actor,)), ("white", "brown")  # the pair that differs most
    (first, alpha), (second, _) = (cut_out(Look(c, shape, hat), setup, actor, aspect=1) for c in pair)
    tints = np.array(list(COLOURS.values())) / 255
    a, b = (np.array(COLOURS[c]) / 255 for c in pair)
    share = (first - second) @ (a - b) / np.square(a - b).sum()
    return first + share[..., None] * (tints - a)[:, None, None], alpha


def _find(
    padded: Float[np.ndarray, "_h _w 3"], small: Float[np.ndarray, "_hh _hw 4"], size: str, position: str
) -> tuple[ReadActor, float] | None:
    """The character of this size at this position and its gain, or None; by all looks, then by the likeliest.

    The frame is padded by REACH; `small` is half as large: colours and mean square.
    """
    t = _templates(size)
    top, left = t.corner[0], t.corner[1] + round((POSITIONS[position] - POSITIONS["left"]) * HEIGHT)
    n, (h, w) = REACH + 1, t.alpha.shape[1:]
    windows = sliding_window_view(small, (h // 2, w // 2), (0, 1))[top // 2 :, left // 2 :][:n, :n]
    rough = t.linear @ rearrange(windows, "y x c h w -> (h w c) (y x)") + t.constant

    def tried(look: int, y: int, x: int) -> tuple[float, float, int, int, int]:
        """Gain and confidence of a look at offsets down and across, in pixels from -REACH; and these three."""
        return *_gain(t, padded[top + y :, :][:h], left + x, look), look, y, x

    finalists = {look: divmod(int(rough[look].argmax()), n) for look in np.argsort(-rough.max(1))[:FINALISTS].tolist()}
    ranked = sorted((tried(look, 2 * y, 2 * x) for look, (y, x) in finalists.items()), reverse=True)
    if ranked[0][1] < THERE / 2:
        return None
    near = {(look, y + dy, x + dx) for *_, look, y, x in ranked[:3] for dy, dx in product((-1, 0, 1), repeat=2)}
    gain, confidence, look, *_ = max(tried(*trial) for trial in near if {*trial[1:]} <= {*range(2 * REACH + 1)})
    return (ReadActor(all_looks()[look], confidence), gain) if confidence >= THERE else None


def _gain(t: _Templates, rows: Float[np.ndarray, "h _w 3"], x: int, look: int) -> tuple[float, float]:
    """Gain and confidence of one look in these rows at column x; on each side of it, a row goes on as it is beyond."""
    (h, w), alpha = t.alpha.shape[1:], t.alpha[look] / np.float32(255)
    pixels = rows[:, x : x + w]
    beyond = [rows[range(h), (x + end).clip(0, rows.shape[1] - 1)] for end in t.edges[look]]
    sides = [np.broadcast_to(colour[:, None], pixels.shape) for colour in beyond]
    nearest = np.concatenate([sides[0][:, : w // 2], sides[1][:, w // 2 :]], 1)
    drawn = t.colour[look] / np.float32(255) + (1 - alpha[..., None]) * nearest
    gain = float((alpha * (_free(pixels, sides) - np.minimum(_distance(pixels, drawn), WRONG))).sum())
    return gain, gain / max(float((alpha * _free(drawn, sides)).sum()), 1e-6)


def _free(pixels: Float[np.ndarray, "h w 3"], sides: list[Float[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "h w"]:
    """The price of pixels as background, which is like one side or the other, or anything."""
    return np.minimum(np.minimum(_distance(pixels, sides[0]), _distance(pixels, sides[1])), ANYTHING)


def read_clip(frames: Sequence[Image.Image], setup: Setup, cast: Mapping[str, Look]) -> ReadClip:
    """Read a shot: which camera move and which actions, drawn over its moved first frame, explain it best.

    The frames are evenly spaced in time from 0 to 1; ValueError if fewer than 5. The setup says who stands where, and
    the shot size. The cast is tag → look, as read from the first frame; who has none is left out.
    """
    if len(frames) < 5:
        raise ValueError(f"{len(frames)} frames show neither a move nor an action; give at least 5")
    chosen = sorted({0, *range(2, len(frames), 3), len(frames) - 1})
    times, seen = [k / (len(frames) - 1) for k in chosen[1:]], np.stack([to_pixels(frames[k]) for k in chosen])
    actors = tuple(actor for actor in setup.actors if actor.tag in cast)
    tried = [_explain(seen, times, replace(setup, actors=actors, camera=camera), cast) for camera in CAMERAS]
    return min(tried, key=lambda result: result[0])[1]


def _explain(
    frames: Float[np.ndarray, "t h w 3"], times: list[float], setup: Setup, cast: Mapping[str, Look]
) -> tuple[float, ReadClip]:
    """The actions that explain most of the frames after the first one, and the mean price of an explained pixel."""
    still, first, seen = replace(setup, camera="static"), frames[0], frames[1:]
    bare = np.ones(first.shape[:2], np.float32)
    for actor in setup.actors:
        bare = bare * (1 - cut_out(cast[actor.tag], still, actor)[1])
    moved = np.stack([_moved(np.dstack([first, bare]), setup, time, PARALLAX) for time in times])
    ground, weight = moved[..., :3], moved[..., 3]
    price, actions = weight * np.minimum(_distance(seen, ground), WRONG), dict[str, str]()
    for actor in setup.actors:
        tried = {}
        for action in ACTIONS:
            poses = [_posed(cast[actor.tag], still, replace(actor, action=action), time) for time in times]
            drawn = np.stack([_moved(pose, setup, time, 1.0) for pose, time in zip(poses, times, strict=True)])
            alpha = drawn[..., 3]
            wrong = alpha * np.minimum(_distance(seen, drawn[..., :3] + (1 - drawn[..., 3:]) * ground), WRONG)
            tried[action] = (1 - alpha) * price + wrong, (1 - alpha) * weight + alpha
        best = actions[actor.tag] = min(tried, key=lambda action: tried[action][0].sum() / tried[action][1].sum())
        price, weight = tried[best]
    return float(price.sum() / weight.sum()), ReadClip(setup.camera, actions)


@lru_cache(maxsize=128)  # the poses of one clip are the same for every camera
def _posed(look: Look, setup: Setup, actor: Actor, time: float) -> Float[np.ndarray, "h w 4"]:
    return np.dstack(cut_out(look, setup, actor, time))


def _moved(sheet: Float[np.ndarray, "h w 4"], setup: Setup, time: float, parallax: float) -> Float[np.ndarray, "h w 4"]:
    """A picture and its alpha as the camera shows them later; what comes from outside has alpha 0."""
    push, shift = camera_at(setup, time)
    if (push, shift) == (1, 0):
        return sheet
    rest = HEIGHT * (1 - 1 / push)  # the frame's zoom is about (1, 0.55)
    affine = (1 / push, 0, rest - parallax * shift * HEIGHT, 0, 1 / push, 0.55 * rest)
    channels = [Image.fromarray(channel) for channel in np.moveaxis(sheet, -1, 0).astype(np.float32)]
    how = channels[0].size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    return np.stack([np.asarray(channel.transform(*how)) for channel in channels], -1)


def to_pixels(image: Image.Image) -> Float[np.ndarray, "h w 3"]:
    """A picture → RGB in [0, 1] at the size that is read."""
    return np.asarray(image.convert("RGB").resize((2 * HEIGHT, HEIGHT), Image.Resampling.BOX), np.float32) / 255


def _half(x: Float[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b _h _w c"]:
    """Means of 2 x 2 pixels."""
    return reduce(x, "... (h 2) (w 2) c -> ... h w c", "mean")


def _distance(a: Float[np.ndarray, "*b c"], b: Float[np.ndarray, "*b c"]) -> Float[np.ndarray, "*b"]:
    """Squared distance of pictures, mean over the channels."""
    difference = a - b
    return np.einsum("...c,...c->...", difference, difference) / a.shape[-1]
