"""Presets: every number of the package that depends on how much machine there is.

A preset changes numbers, never code paths. `toy` runs on two CPU cores with the weights in the package;
`small` on one 48 GB GPU; `flux` is FLUX.1-dev and LTX-Video on 80 GB.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cinema.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
PHI = (1 + 5**0.5) / 2


@dataclass(frozen=True)
class KeyframeSettings:
    """How keyframes are planned."""

    weights: str  #: folder or hub name of a diffusers Flux pipeline
    height: int  #: pixels of a keyframe, a multiple of 16
    width: int  #: pixels, twice the height
    text_tokens: int  #: length that captions are padded to; longer ones are cut, with a warning
    steps: int  #: Euler steps from noise to picture
    shift: float  #: time shift of the sampling schedule, > 1 spends more steps on noise
    guidance: float  #: classifier-free guidance scale, 1 is none; costs a second forward pass above 1
    distilled_guidance: float  #: the scale a guidance-distilled base (FLUX.1-dev) is told; ignored by others
    context_sigma: float  #: noise of remembered keyframes, in the paper's best range 0.001-0.25
    memory_levels: int  #: GoldenMem levels kept
    memory_group: int  #: keyframes per level
    memory_ratio: float | tuple[float, ...]  #: between the sides of neighbouring levels; the paper's is golden
    memory_extent: bool  #: rope gives a small level the extent of the finest one; else as many units as it has patches
    retrieval: str  #: who chooses what is remembered, and how large: recency, clip, t5, random or oracle
    window: int  #: keyframes that are drawn together, each seeing the others as `mask` says
    mask: str  #: who sees whom: "full", or "causal", each the earlier ones
    towers: str  #: folder of open_clip towers, or their name and weights, such as ViT-B-32:laion2b_s34b_b79k


@dataclass(frozen=True)
class VideoSettings:
    """How shots are synthesised from keyframes; what is not explained here is as for keyframes."""

    weights: str  #: folder or hub name of a diffusers LTX pipeline
    height: int  #: pixels of a frame, a multiple of the video VAE's stride
    width: int  #: likewise
    frames: int  #: frames of a shot when the story does not say, 8k + 1
    fps: int  #: frames per second of the film
    window: int  #: shots that are synthesised together
    text_tokens: int
    steps: int
    shift: float
    guidance: float
    keyframe_sigma: float  #: small noise on what conditions: keyframes, and shots drawn before
    overlap: int  #: shots of a window that the window before it has drawn
    memory_levels: int  #: the finest is for the window's own keyframes, the others for keyframes outside; 1 for none
    memory_group: int  #: keyframes outside per level
    memory_ratio: float | tuple[float, ...]
    retrieval: str  #: who chooses them; recency takes the nearest
    towers: str


@dataclass(frozen=True)
class Preset:
    """One size of everything."""

    name: str
    dtype: str  #: torch dtype name of weights and activations at inference
    tags: tuple[str, ...]  #: names that the text encoders know; a story's own are mapped onto them. Empty: any goes
    keyframes: KeyframeSettings
    video: VideoSettings

    def remembering(self, **settings: Any) -> "Preset":
        """The preset with other settings of keyframes, where they are not None."""
        given = {name: value for name, value in settings.items() if value is not None}
        return replace(self, keyframes=replace(self.keyframes, **given))


# fmt: off
TOY_NAMES = (
    "ada", "bo", "cleo", "dax", "eva", "finn", "gus", "hana",
    "ivo", "juno", "kit", "lena", "milo", "nia", "otto", "pia",
)

TOY = Preset(
    name="toy", dtype="bfloat16", tags=tuple(f"<{n}>" for n in TOY_NAMES),
    keyframes=KeyframeSettings(
        weights=str(WEIGHTS / "keyframes"), height=128, width=256, text_tokens=28,
        steps=16, shift=3.0, guidance=2.0, distilled_guidance=1.0, context_sigma=0.05,
        memory_levels=5, memory_group=4,
        memory_ratio=1.58,  # sides 8, 5, 3, 2, 1; so small a grid rounds the golden ratio to 8, 4, 3, 1, 1
        memory_extent=True, window=1, mask="causal",
        retrieval="recency", towers=str(WEIGHTS / "retrieval"),
    ),
    video=VideoSettings(
        weights=str(WEIGHTS / "video"), height=128, width=256, frames=17, fps=8, window=4, text_tokens=28,
        steps=12, shift=2.0, guidance=1.0, keyframe_sigma=0.02, overlap=0,
        memory_levels=1, memory_group=4, memory_ratio=1.58, retrieval="recency", towers=str(WEIGHTS / "retrieval"),
    ),
)
FLUX = Preset(
    name="flux", dtype="bfloat16", tags=(),
    keyframes=replace(
        TOY.keyframes, weights="black-forest-labs/FLUX.1-dev",
        height=400, width=800,  # the paper's: 25 x 50 tokens
        text_tokens=128,  # read off Fig. 4
        steps=28, guidance=1.0, distilled_guidance=3.5,  # its guidance is distilled: one pass a step
        memory_levels=6, memory_ratio=PHI,  # sides 25, 15, 9, 5, 3, 2
        retrieval="clip", towers="ViT-B-32:laion2b_s34b_b79k",
    ),
    video=replace(
        TOY.video, weights="Lightricks/LTX-Video", height=480, width=960,
        frames=121, fps=24,  # 5 s
        window=9,  # LCT's longest scene
        text_tokens=128, steps=30, guidance=3.0, overlap=1,
        memory_levels=4, memory_ratio=PHI, retrieval="clip", towers="ViT-B-32:laion2b_s34b_b79k",
    ),
)
SMALL = replace(
    FLUX, name="small",
    keyframes=replace(FLUX.keyframes, height=256, width=512, memory_levels=5),  # 16 x 32 tokens
    video=replace(FLUX.video, height=320, width=640, frames=49, window=4),
)
# fmt: on
PRESETS = {p.name: p for p in (TOY, SMALL, FLUX)}


def preset(name: str | None = None) -> Preset:
    """The preset of that name, or of the environment's `CINEMA_PRESET`, or `toy`; UserError if there is none.

    Folders named in `CINEMA_KEYFRAME_WEIGHTS` and `CINEMA_VIDEO_WEIGHTS` replace the preset's weights.
    """
    name = name or os.environ.get("CINEMA_PRESET") or "toy"
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    chosen = PRESETS[name].remembering(weights=os.environ.get("CINEMA_KEYFRAME_WEIGHTS") or None)
    video = os.environ.get("CINEMA_VIDEO_WEIGHTS") or chosen.video.weights
    return replace(chosen, video=replace(chosen.video, weights=video))
