"""Presets: every number of the package that depends on how much machine there is.

A preset changes numbers, never code paths. `toy` runs on two CPU cores with the weights in the package;
`small` on one 16-24 GB GPU; `flux` is FLUX.1-dev and LTX-Video on 80 GB.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from cinema.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
PHI = (1 + 5**0.5) / 2


@dataclass(frozen=True)
class KeyframeSettings:
    """How keyframes are planned.

    Attributes:
        weights: folder or hub name of a diffusers Flux pipeline.
        height, width: pixels of a keyframe; both multiples of 16.
        text_tokens: length that captions are padded to; longer ones are cut, with a warning.
        steps: Euler steps from noise to picture.
        shift: time shift of the sampling schedule, > 1 spends more steps on noise.
        guidance: classifier-free guidance scale, 1 is none; costs a second forward pass above 1.
        distilled_guidance: the scale a guidance-distilled base (FLUX.1-dev) is told; ignored by others.
        context_sigma: noise of remembered keyframes, in the paper's best range 0.001-0.25.
        memory_levels, memory_group: GoldenMem levels kept, and images per level.
        memory_ratio: between the sides of neighbouring levels; the paper's is the golden ratio.
    """

    weights: str
    height: int
    width: int
    text_tokens: int
    steps: int
    shift: float
    guidance: float
    distilled_guidance: float
    context_sigma: float
    memory_levels: int
    memory_group: int
    memory_ratio: float


@dataclass(frozen=True)
class VideoSettings:
    """How shots are synthesised from keyframes.

    Attributes:
        weights: folder or hub name of a diffusers LTX pipeline.
        height, width: pixels of a frame; multiples of the video VAE's stride.
        frames: frames of a shot when the story does not say, 8k + 1.
        fps: frames per second of the film.
        window: shots that are synthesised together.
        text_tokens: length that captions are padded to.
        steps, shift, guidance: as for keyframes.
        keyframe_sigma: small noise on the keyframe conditions.
    """

    weights: str
    height: int
    width: int
    frames: int
    fps: int
    window: int
    text_tokens: int
    steps: int
    shift: float
    guidance: float
    keyframe_sigma: float


@dataclass(frozen=True)
class Preset:
    """One size of everything.

    Attributes:
        dtype: torch dtype name of weights and activations at inference.
        tags: names that the text encoders know; a story's own tags are mapped onto them. Empty: any name goes.
    """

    name: str
    dtype: str
    tags: tuple[str, ...]
    keyframes: KeyframeSettings
    video: VideoSettings


# fmt: off
TOY_NAMES = (
    "ada", "bo", "cleo", "dax", "eva", "finn", "gus", "hana",
    "ivo", "juno", "kit", "lena", "milo", "nia", "otto", "pia",
)
# fmt: on

TOY = Preset(
    name="toy",
    dtype="bfloat16",
    tags=tuple(f"<{n}>" for n in TOY_NAMES),
    keyframes=KeyframeSettings(
        weights=str(WEIGHTS / "keyframes"),
        height=128,
        width=256,
        text_tokens=28,
        steps=16,
        shift=3.0,
        guidance=1.0,
        distilled_guidance=1.0,
        context_sigma=0.05,
        memory_levels=5,
        memory_group=4,
        memory_ratio=1.58,  # sides 8, 5, 3, 2, 1; so small a grid rounds the golden ratio to 8, 4, 3, 1, 1
    ),
    video=VideoSettings(
        weights=str(WEIGHTS / "video"),
        height=128,
        width=256,
        frames=17,
        fps=8,
        window=4,
        text_tokens=28,
        steps=12,
        shift=2.0,
        guidance=1.0,
        keyframe_sigma=0.02,
    ),
)
FLUX = Preset(
    name="flux",
    dtype="bfloat16",
    tags=(),
    keyframes=replace(
        TOY.keyframes,
        weights="black-forest-labs/FLUX.1-dev",
        height=400,  # the paper's 400 x 800: 25 x 50 tokens
        width=800,
        text_tokens=128,  # read off Fig. 4
        steps=28,
        shift=3.0,
        distilled_guidance=3.5,
        memory_levels=6,  # sides 25, 15, 9, 5, 3, 2
        memory_ratio=PHI,
    ),
    video=replace(
        TOY.video,
        weights="Lightricks/LTX-Video",
        height=480,
        width=960,
        frames=121,  # 5 s
        fps=24,
        window=9,  # LCT's longest scene
        text_tokens=128,
        steps=30,
        guidance=3.0,
    ),
)
SMALL = replace(
    FLUX,
    name="small",
    keyframes=replace(FLUX.keyframes, height=256, width=512, memory_levels=5),  # 16 x 32 tokens
    video=replace(FLUX.video, height=320, width=640, frames=49, window=4),
)
PRESETS = {p.name: p for p in (TOY, SMALL, FLUX)}


def preset(name: str | None = None) -> Preset:
    """The preset of that name, or of the environment's `CINEMA_PRESET`, or `toy`.

    Folders named in `CINEMA_KEYFRAME_WEIGHTS` and `CINEMA_VIDEO_WEIGHTS` replace the preset's weights.

    Raises:
        UserError: no preset has that name.
    """
    name = name or os.environ.get("CINEMA_PRESET") or "toy"
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    keyframes = os.environ.get("CINEMA_KEYFRAME_WEIGHTS") or chosen.keyframes.weights
    video = os.environ.get("CINEMA_VIDEO_WEIGHTS") or chosen.video.weights
    return replace(
        chosen,
        keyframes=replace(chosen.keyframes, weights=keyframes),
        video=replace(chosen.video, weights=video),
    )
