"""The video autoencoder: a small `AutoencoderKLLTXVideo`, trained on clips of the toy world.

Its latents have LTX-Video's 128 channels, for 16 x 16 pixels of 4 frames: half of LTX-Video's strides, because toy
frames are small and a first frame has to be its keyframe. The first latent frame sees the first picture only, and the
decoder is causal too, so a shot's first frame depends on its keyframe's latent alone.
Axes: `b` clips, `t` frames, `c` channels, `h w` pixels.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from einops import rearrange
from jaxtyping import Float
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from cinema.config import TOY
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, Setup, sample_movie
from cinema.training.autoencoder import AutoencoderLearner, AutoencoderTask, edge_error, psnr, to_tensor


@dataclass(kw_only=True)
class VideoAutoencoderTask(AutoencoderTask):
    """Clips to latents and back: absolute and squared error, edges, a little KL."""

    height: PositiveInt = TOY.video.height
    frames: PositiveInt = TOY.video.frames
    stills: int = (
        0  #: first so many steps train on single frames, four for a clip: cheap, and the first frame comes first
    )
    first: float = 4.0  #: extra weight of the first frame, which has to be its keyframe
    motion: float = 2.0  #: extra weight of pixels that differ from the first frame
    kl = 1e-5

    def build(self) -> AutoencoderLearner:
        """An `AutoencoderKLLTXVideo` of LTX-Video 0.9.5's blocks, which move pixels into channels and back."""
        return AutoencoderLearner(self.load(AutoencoderKLLTXVideo, "video/vae"), new=not self.init)

    def drawn(self, step: int, count: int) -> Float[Tensor, "n 3 *size"]:
        """Clips, or stills."""
        count, frames = (4 * count, 1) if step < self.stills else (count, self.frames)
        return clips_of_step(self.seed, step, count, self.height, frames)

    def error(
        self, decoded: Float[Tensor, "n 3 *size"], frames: Float[Tensor, "n 3 *size"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Error of a reconstruction, and figures to log."""
        difference, weight = decoded - frames, self._weight(frames)
        pixel = (weight * (difference.abs() + 2 * difference.square())).mean() / weight.mean()
        firsts = decoded[:, :, 0], frames[:, :, 0]
        pictures = (rearrange(x, "b c t h w -> (b t) c h w") for x in (decoded, frames))
        edge = edge_error(*pictures) + self.first * edge_error(*firsts)
        figures = {"psnr": psnr(decoded, frames), "psnr_first": psnr(*firsts)}
        return pixel + self.edges * edge / (1 + self.first), figures

    def normalise(self, vae: Any) -> None:
        """Measure mean and standard deviation of the latents' channels on fresh clips."""
        latents = torch.cat([vae.encode(self.drawn(10**7 + i, 4)).latent_dist.mode() for i in range(8)])
        vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
        vae.latents_std.copy_(latents.std((0, 2, 3, 4)))

    def _weight(self, clips: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 1 t h w"]:
        moved = ((clips - clips[:, :, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        weight = 1 + self.motion * moved
        weight[:, :, 0] += self.first
        return weight


def clip_frames(movie: Movie, setup: Setup, height: int, frames: int) -> Float[Tensor, "3 frames h w"]:
    """A shot of the toy world as RGB in [-1, 1]."""
    moments = [render(movie, setup, height, time=i / max(1, frames - 1)) for i in range(frames)]
    return rearrange(to_tensor(moments), "t c h w -> c t h w")


def clips_of_step(seed: int, step: int, count: int, height: int, frames: int) -> Float[Tensor, "count 3 frames h w"]:
    """Fresh clips, RGB in [-1, 1]; a function of (seed, step) alone."""
    movies = (sample_movie(f"clips/{seed}/{step}/{i}", 1) for i in range(count))
    return torch.stack([clip_frames(m, m.shots[0], height, frames) for m in movies])
