"""The attribute reader: analysis by synthesis. It draws what could be there and says what fits, from pixels alone.

A character explains a pixel, or the background does: the colours beside the character, row by row, for nothing, or at
a price anything. A candidate's *gain* is what it explains better than the background; its *confidence* is that over
a perfect drawing's gain. Prices are squared distances, mean over the channels, of RGB in [0, 1]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import cv2
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from cinema.toyworld.draw import PARALLAX, ZOOM, camera_at, character, filmed, glue
from cinema.toyworld.world import ACTIONS, CAMERAS, PLACES, POSITIONS, SIZES, Actor, Look, Setup, all_looks

HEIGHT = 128  # pixels that every frame is read at
REACH = 4  # pixels by which a character may stand beside its mark
MARGIN = 4  # pixels from a silhouette to the background that is beside it for sure
ANYTHING = 0.03  # highest price of a background pixel
WRONG = 0.06  # highest price of a pixel that a character should explain
THERE = 0.1  # least confidence of a character that is there; on empty sets nothing gets above 0
FINALISTS = 16  # looks that are compared at full resolution
HORIZONS = np.linspace(0.52, 0.66, 15)  # where a set's may be
PALETTE = 10.0  # of 255: farthest apart that sky, or ground, of one set is in two shots
PROPS = 0.7  # least correlation of what stands out from the rows of one set in two shots
HALF = "... (h 2) (w 2) c -> ... h w c"


@dataclass(frozen=True)
class ReadActor:
    """A character that was found, by the look that fits best; a confidence of 1 is a perfect drawing."""

    look: Look
    confidence: float
    gain: float


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
    pixels, band = to_pixels(image), HEIGHT // 16
    padded = np.pad(pixels, ((REACH, REACH), (REACH, REACH), (0, 0)), "edge")
    cast = {s: {p: hit for p in POSITIONS if (hit := _templates(s).find(padded, p))} for s in SIZES}
    size, found = max(cast.items(), key=lambda item: sum(actor.gain for actor in item[1].values()))
    seen = np.concatenate([np.median(rows, (0, 1)) for rows in (pixels[:band], pixels[-band:])])
    palettes = {name: np.array([*sky, *ground]) / 255 for name, (sky, _, ground) in PLACES.items()}
    place = min(palettes, key=lambda name: float(np.abs(palettes[name] - seen).sum()))
    return ReadFrame(place, size if found else None, found, setup)


class _Templates:
    """Every look at one size, cut out at the left mark and cropped, and what finds it; frames are padded by REACH."""

    def __init__(self, size: str) -> None:
        actor = Actor("", "left", "standing")
        setup = Setup("", size, "static", (actor,))
        drawn = np.stack([np.dstack(cut_out(look, setup, actor, aspect=1)) for look in all_looks()])
        solid = drawn[..., 3] > 0.02
        (top, *_, bottom), (left, *_, right) = (np.flatnonzero(solid.any((0, axis))) // 2 * 2 for axis in (2, 1))
        crop = np.s_[:, top : bottom + 2, left : right + 2]
        drawn, solid, self.corner = drawn[crop], solid[crop], (int(top), int(left))
        ends = solid.argmax(2) - MARGIN, solid.shape[2] - 1 - solid[..., ::-1].argmax(2) + MARGIN
        self.edges = np.stack(ends, 1)  # "looks 2 h": columns MARGIN beyond the silhouette
        self.sheets = np.round(255 * drawn).clip(0, 255).astype(np.uint8)  # "looks h w 4": RGB times alpha, alpha
        c, a = np.split(reduce(drawn, HALF, "mean"), [3], -1)
        # On a background that could be anything, the gain is linear in colours and mean squares, at half resolution.
        self.linear = np.concatenate([2 / 3 * c, -a], -1).reshape(len(c), -1)  # of a (anything - |pixel - c / a|^2)
        self.constant = (ANYTHING * a - (c**2).mean(-1, keepdims=True) / np.maximum(a, 1e-3)).sum((1, 2))

    def find(self, padded: Float[np.ndarray, "_h _w 3"], position: str) -> ReadActor | None:
        """The character of this size at this position, or None; by all looks, then by the likeliest."""
        top, left = self.corner[0], self.corner[1] + round((POSITIONS[position] - POSITIONS["left"]) * HEIGHT)
        n, (h, w), half = REACH + 1, self.sheets.shape[1:3], reduce(padded, HALF, "mean")
        small = np.dstack([half, (half**2).mean(-1)])
        windows = sliding_window_view(small, (h // 2, w // 2), (0, 1))[top // 2 :, left // 2 :][:n, :n]
        rough = self.linear @ rearrange(windows, "y x c h w -> (h w c) (y x)") + self.constant

        def tried(look: int, y: int, x: int) -> tuple[float, float, int, int, int]:
            """Gain and confidence of a look at offsets down and across, in pixels from -REACH; and these three."""
            return *self._gain(padded[top + y :][:h], left + x, look), look, y, x

        best = np.argsort(-rough.max(1))[:FINALISTS].tolist()
        ranked = sorted((tried(k, *(2 * i for i in divmod(int(rough[k].argmax()), n))) for k in best), reverse=True)
        if ranked[0][1] < THERE / 2:
            return None
        near = {(look, y + dy, x + dx) for *_, look, y, x in ranked[:3] for dy, dx in product((-1, 0, 1), repeat=2)}
        gain, confidence, look, *_ = max(tried(*k) for k in near if {*k[1:]} <= {*range(2 * REACH + 1)})
        return ReadActor(all_looks()[look], confidence, gain) if confidence >= THERE else None

    def _gain(self, rows: Float[np.ndarray, "h _w 3"], x: int, look: int) -> tuple[float, float]:
        """Gain and confidence of one look in these rows at column x; on each side of it, a row goes on as beyond."""
        (h, w), sheet = self.sheets.shape[1:3], self.sheets[look] / np.float32(255)
        pixels, alpha = rows[:, x : x + w], sheet[..., 3]
        beyond = [rows[range(h), (x + end).clip(0, rows.shape[1] - 1)] for end in self.edges[look]]
        sides = [np.broadcast_to(colour[:, None], pixels.shape) for colour in beyond]
        nearest = np.concatenate([sides[0][:, : w // 2], sides[1][:, w // 2 :]], 1)
        drawn = sheet[..., :3] + (1 - sheet[..., 3:]) * nearest

        def free(seen: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
            """The price of pixels as background, which is like one side or the other, or anything."""
            return np.minimum(np.minimum(_distance(seen, sides[0]), _distance(seen, sides[1])), ANYTHING)

        gain = float((alpha * (free(pixels) - np.minimum(_distance(pixels, drawn), WRONG))).sum())
        return gain, gain / max(float((alpha * free(drawn)).sum()), 1e-6)


_templates = lru_cache(_Templates)


def is_same_set(a: Image.Image, setup_a: Setup, b: Image.Image, setup_b: Setup) -> bool:
    """Whether two keyframes show one set: sky and ground have its palette, and props stand where they stood.

    The nearer shot is compared with the same part of the wider one, wherever no character stands in either; about
    which horizon it has to be magnified, the pictures tell.
    """
    (wide, setup), (near, setup_near) = sorted(((a, setup_a), (b, setup_b)), key=lambda shown: ZOOM[shown[1].size])
    scale, near_sheet, wide_sheet = (
        ZOOM[setup_near.size] / ZOOM[setup.size],
        bare_set(near, setup_near),
        bare_set(wide, setup),
    )
    tried = [magnified(wide_sheet, scale, horizon) for horizon in (HORIZONS if scale > 1 else HORIZONS[:1])]
    seen = [(sheet[..., 3] > 0.99) & (near_sheet[..., 3] > 0) for sheet in tried]
    off = [
        float(_distance(sheet, near_sheet)[ok].mean()) if ok.any() else 1.0
        for sheet, ok in zip(tried, seen, strict=True)
    ]
    best = int(np.argmin(off))
    hidden, band = ~seen[best], HEIGHT // 5
    x, y = (np.ma.array(s[..., :3], mask=np.dstack([hidden] * 3)) for s in (tried[best], near_sheet))
    ends = [[np.ma.median(picture[rows], (0, 1)) for picture in (x, y)] for rows in (np.s_[:band], np.s_[-band:])]
    palette = max(float(np.ma.filled(np.ma.sqrt(((one - other) ** 2).sum()), 0.0)) for one, other in ends)
    p, q = ((g - np.ma.median(g, 1)[:, None]).filled(0.0) for g in (x.mean(-1), y.mean(-1)))
    props = float((p * q).sum() / np.sqrt((p**2).sum() * (q**2).sum() + 1e-9))
    return 255 * palette <= PALETTE and props >= PROPS


def bare_set(image: Image.Image, setup: Setup) -> Float[np.ndarray, "h w 4"]:
    """A keyframe's pixels, and 1 where no character is near."""
    seen, empty = read_keyframe(image, setup), np.ones((HEIGHT, 2 * HEIGHT), np.float32)
    for actor in setup.actors:
        if found := seen.actor(actor.tag):
            empty *= cut_out(found.look, setup, actor)[1] < 0.02
    return np.dstack([to_pixels(image), cv2.erode(empty, np.ones((MARGIN + 1, MARGIN + 1)))])


def magnified(sheet: Float[np.ndarray, "h w c"], scale: float, horizon: float) -> Float[np.ndarray, "h w c"]:
    """A set's picture as a nearer shot shows it: magnified about the middle of its horizon."""
    x, y = (at * HEIGHT - 0.5 for at in (1, horizon))
    affine = np.array([[1 / scale, 0, x - x / scale], [0, 1 / scale, y - y / scale]])
    return cv2.warpAffine(sheet, affine, (2 * HEIGHT, HEIGHT), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def read_clip(frames: Sequence[Image.Image], setup: Setup, cast: Mapping[str, Look]) -> ReadClip:
    """Read a shot: which camera move and which actions, drawn over its moved first frame, explain it best.

    The frames are evenly spaced in time from 0 to 1; ValueError if fewer than 5. The setup says who stands where, and
    the shot size. The cast is tag → look, as read from the first frame; who has none is left out.
    """
    if len(frames) < 5:
        raise ValueError(f"{len(frames)} frames show neither a move nor an action; give at least 5")
    chosen = sorted({*range(2, len(frames), 3), len(frames) - 1})
    times, seen = [k / (len(frames) - 1) for k in chosen], np.stack([to_pixels(frames[k]) for k in chosen])
    actors, bare = [actor for actor in setup.actors if actor.tag in cast], np.ones((HEIGHT, 2 * HEIGHT), np.float32)
    for actor in actors:
        bare = bare * (1 - cut_out(cast[actor.tag], setup, actor)[1])
    still, results = np.dstack([to_pixels(frames[0]), bare]), list[tuple[float, ReadClip]]()
    for camera in CAMERAS:
        shot, actions = replace(setup, camera=camera), dict[str, str]()
        moved = np.stack([_moved(still, shot, time) for time in times])
        ground, weight = moved[..., :3], moved[..., 3]
        price = weight * np.minimum(_distance(seen, ground), WRONG)
        for actor in actors:
            tried = {}
            for action in ACTIONS:
                poses = [cut_out(cast[actor.tag], shot, replace(actor, action=action), time) for time in times]
                colour, alpha = (np.stack(x) for x in zip(*poses, strict=True))
                wrong = alpha * np.minimum(_distance(seen, colour + (1 - alpha[..., None]) * ground), WRONG)
                tried[action] = (1 - alpha) * price + wrong, (1 - alpha) * weight + alpha
            best = actions[actor.tag] = min(tried, key=lambda action: tried[action][0].sum() / tried[action][1].sum())
            price, weight = tried[best]
        results.append((float(price.sum() / weight.sum()), ReadClip(camera, actions)))
    return min(results, key=lambda result: result[0])[1]


def _moved(sheet: Float[np.ndarray, "h w 4"], setup: Setup, time: float) -> Float[np.ndarray, "h w 4"]:
    """A set and its alpha as the camera shows them later; what comes from outside has alpha 0."""
    push, shift = camera_at(setup, time)
    x, y = ((at * HEIGHT - 0.5) * (1 - 1 / push) for at in (1, 0.55))  # the frame's zoom is about (1, 0.55)
    affine = np.array([[1 / push, 0, x - PARALLAX * shift * HEIGHT], [0, 1 / push, y]])
    return cv2.warpAffine(sheet, affine, (2 * HEIGHT, HEIGHT), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def to_pixels(image: Image.Image) -> Float[np.ndarray, "h w 3"]:
    """A picture → RGB in [0, 1] at the size that is read."""
    return np.asarray(image.convert("RGB").resize((2 * HEIGHT, HEIGHT), Image.Resampling.BOX), np.float32) / 255


def _distance(a: Float[np.ndarray, "*b c"], b: Float[np.ndarray, "*b c"]) -> Float[np.ndarray, "*b"]:
    """Squared distance of pictures, mean over the channels."""
    difference = a - b
    return np.einsum("...c,...c->...", difference, difference) / a.shape[-1]
