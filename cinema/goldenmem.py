"""GoldenMem: the newest keyframe whole, remembered ones in sizes that shrink by the golden ratio.

A level is a grid of `side` x 2 `side` patches. All levels together cost less than phi times the newest frame, however
many there are (paper, section 3.2); text is not compressed. Axes: `n` frames, `s` tokens of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor
from operator import mul

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from cinema.config import PHI

PATCH = 16  # pixels of a patch's side: 8 of the VAE times 2 of the packing


def levels(side: int, count: int, ratio: float | Sequence[float] = PHI) -> tuple[int, ...]:
    """Short sides of `count` levels in patches, finest first: s_i = floor(s_0 / ratio^i).

    The direct form: rounding down at every step instead gives 1 where Fig. 4 has 2. A sequence has a ratio for each
    step from a level to the next, 1 for none. ValueError where none fit.
    """
    steps = ratio if isinstance(ratio, Sequence) else [ratio] * (count - 1)
    if len(steps) != count - 1 or min(steps, default=1) < 1 or ratio == 1:
        rule = f"above 1, or from 1 on for each of {count - 1} steps"
        raise ValueError(f"the ratio between levels is {ratio}, it must be {rule}")
    sides = tuple(floor(side / shrunk + 1e-9) for shrunk in accumulate(steps, mul, initial=1.0))
    if sides[-1] < 1:
        raise ValueError(f"{count} levels are too many for {side} patches: level {sides.index(0)} would have none")
    return sides


def tokens(side: int) -> int:
    """Image tokens of a level: t = 2 side^2."""
    return 2 * side * side


@dataclass(frozen=True)
class Layout:
    """Which pair sits at which level; ValueError if the pairs do not fit."""

    pairs: int  #: how many, in the order of time; the last is the newest, which is drawn
    side: int  #: short side of the newest pair in patches
    count: int  #: levels available
    group: int  #: pairs per level; the newest is one of the finest level's. Fig. 4 has 4
    ratio: float | tuple[float, ...] = PHI  #: between the sides of neighbouring levels, or one for each step
    rank: tuple[int, ...] | None = None  #: importance of each pair, 0 for the highest; else the newest comes first

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"a layout needs at least one pair, not {self.pairs}")
        if self.pairs > self.count * self.group:
            raise ValueError(f"{self.pairs} pairs do not fit in {self.count} levels of {self.group}")
        levels(self.side, self.count, self.ratio)

    @property
    def sides(self) -> tuple[int, ...]:
        """Short side of every pair, in the order of time."""
        sides = levels(self.side, self.count, self.ratio)
        return tuple(sides[r // self.group] for r in self.rank or range(self.pairs - 1, -1, -1))

    def by_level(self) -> list[tuple[int, list[int]]]:
        """(side, its pairs in the order of time) of every size in use, finest first: one fold each."""
        sides = self.sides
        return [(s, [i for i, own in enumerate(sides) if own == s]) for s in sorted(set(sides), reverse=True)]

    def tokens(self, text: int = 0) -> int:
        """Tokens of the whole sequence, with `text` tokens per pair."""
        return sum(tokens(side) + text for side in self.sides)


def shrink(frames: Float[Tensor, "n 3 height width"], side: int) -> Float[Tensor, "n 3 small_h small_w"]:
    """Shrink remembered frames in pixel space, by area, to a level's 16 `side` x 32 `side` (paper, section 4.2).

    ValueError if `side` is below 1 or above the frames' own, or they are not twice as wide as high.
    """
    height, width = frames.shape[2:]
    if width != 2 * height:
        raise ValueError(f"frames are {height} x {width} pixels; they must be twice as wide as high")
    if side < 1 or PATCH * side > height:
        raise ValueError(f"a level of {side} patches does not fit a frame {height // PATCH} patches high")
    return F.interpolate(frames, (PATCH * side, 2 * PATCH * side), mode="area")


def coordinates(side: int, finest: int, extent: bool = True) -> Float[Tensor, "s 2"]:
    """(y, x) of a level's patches in units of the finest level's, which every level covers whole.

    Cell i of a level lies at (i + 1/2) finest / side - 1/2: the finest level has 0, 1, 2 ..., a coarse one
    the centres of its larger cells. Without `extent` cells are just counted, so that a coarse level lies in the
    upper left corner.
    """
    centre = (torch.arange(2 * side, dtype=torch.float32) + 0.5) * (finest / side if extent else 1) - 0.5
    y, x = repeat(centre[:side], "h -> h w", w=2 * side), repeat(centre, "w -> h w", h=side)
    return rearrange([y, x], "yx h w -> (h w) yx")
