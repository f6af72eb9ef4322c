"""The autoencoders: a small `AutoencoderKL`, trained on frames, and a small `AutoencoderKLLTXVideo`, on clips.

The video latents have LTX-Video's 128 channels, for 16 x 16 pixels of 4 frames: half of LTX-Video's strides, because
toy frames are small and a first frame has to be its keyframe. The first latent frame sees the first picture only, and
the decoder is causal too, so a shot's first frame depends on its keyframe's latent alone.
Axes: `n` frames or clips, `t` moments, `c` channels, `h w` pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision.utils import save_image

from cinema.config import TOY
from cinema.toyworld.draw import render
from cinema.toyworld.film import draw_clip
from cinema.toyworld.world import Movie, Setup, sample_movie
from cinema.training.config import Stage
from cinema.training.loop import Task


class AutoencoderLearner(nn.Module):
    """What is trained: frames or clips through a sample of their latents and back; a new one's variances are small."""

    def __init__(self, vae: Any, new: bool) -> None:
        super().__init__()
        self.vae, last = vae, getattr(vae.encoder.conv_out, "conv", vae.encoder.conv_out)
        if new:
            last.weight.data[vae.config["latent_channels"] :] *= 0.1
            last.bias.data[vae.config["latent_channels"] :] = -6.0

    def forward(
        self, frames: Float[Tensor, "n 3 *size"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n 3 *size"], Float[Tensor, ""]]:
        """Decoded frames, and the KL divergence of their latents from a normal distribution, in float32."""
        posterior = self.vae.encode(frames.to(next(self.parameters()).dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=frames.device)
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return self.vae.decode(latents).sample.float(), 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@dataclass(kw_only=True)
class AutoencoderTask(Task):
    """Pixels to latents of 1/8 the size and back: absolute and squared error, edges, a little KL."""

    height: PositiveInt = TOY.keyframes.height
    kl, edges = 1e-4, 0.5  # weights in the loss

    def build(self) -> AutoencoderLearner:
        """An `AutoencoderKL` with FLUX's latent layout, 16 channels at 1/8.

        It has one norm group: several groups of few channels each would normalise colour away.
        """
        return AutoencoderLearner(self.load(AutoencoderKL, "keyframes/vae"), new=not self.init)

    def drawn(self, step: int, count: int) -> Float[Tensor, "n 3 *size"]:
        """What is to be reconstructed at this step."""
        return frames_of_step(self.seed, step, count, self.height)

    def error(
        self, decoded: Float[Tensor, "n 3 *size"], frames: Float[Tensor, "n 3 *size"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Error of a reconstruction, and figures to log."""
        pixel = (decoded - frames).abs().mean() + 2 * (decoded - frames).square().mean()
        return pixel + self.edges * edge_error(decoded, frames), {"psnr": psnr(decoded, frames)}

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Error of reconstructing this step's batch from a sample of its latents."""
        frames = self.drawn(step, stage.batch).to(self.device)
        decoded, kl = model(frames, torch.Generator(self.device).manual_seed(step))
        error, figures = self.error(decoded, frames)
        return error + self.kl * kl, figures | {"kl": kl.item()}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Normalise the latents, then write the autoencoder's folder in bfloat16."""
        vae = type(self.model.vae).from_config(self.model.vae.config)
        vae.load_state_dict(self.model.vae.state_dict())
        self.normalise(vae)
        vae.to(torch.bfloat16).save_pretrained(folder)

    def normalise(self, vae: Any) -> None:
        """Whiten the latents and measure their shift and scale, on fresh frames."""
        frames = self.drawn(10**7, 64)
        whiten(vae, frames)
        latents = vae.encode(frames).latent_dist.mode()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Fresh frames above their reconstructions."""
        frames = self.drawn(10**7 + 100, 3).to(self.device)
        decoded = self.model.vae.decode(self.model.vae.encode(frames).latent_dist.mode()).sample
        moments = rearrange([frames, decoded], "two n c ... h w -> two n c (...) h w")
        shown = moments[:, :, :, [0, moments.shape[3] // 2, -1][: moments.shape[3]]]
        save_sheet(path, rearrange(shown, "two n c t h w -> (n two t) c h w"), columns=shown.shape[3])


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
        pictures = (rearrange(x, "n c t h w -> (n t) c h w") for x in (decoded, frames))
        edge = edge_error(*pictures) + self.first * edge_error(*firsts)
        figures = {"psnr": psnr(decoded, frames), "psnr_first": psnr(*firsts)}
        return pixel + self.edges * edge / (1 + self.first), figures

    def normalise(self, vae: Any) -> None:
        """Measure mean and standard deviation of the latents' channels on fresh clips."""
        latents = torch.cat([vae.encode(self.drawn(10**7 + i, 4)).latent_dist.mode() for i in range(8)])
        vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
        vae.latents_std.copy_(latents.std((0, 2, 3, 4)))

    def _weight(self, clips: Float[Tensor, "n 3 t h w"]) -> Float[Tensor, "n 1 t h w"]:
        moved = ((clips - clips[:, :, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        weight = 1 + self.motion * moved
        weight[:, :, 0] += self.first
        return weight


@torch.no_grad()
def whiten(vae: AutoencoderKL, frames: Float[Tensor, "n 3 h w"], floor: float = 0.5) -> None:
    """Decorrelate the latents' channels, by a matrix folded into the encoder's last and the decoder's first layer.

    Decoded pictures stay the same. Without it most of the latents' variance is colour: a frame's palette then shows
    through almost any noise, and a model that can look does not learn to read it from the caption. Channels whose
    deviation on `frames` is below `floor` times the median are amplified no more than one at that limit.
    """
    latents = rearrange(vae.encode(frames).latent_dist.mode(), "n c y x -> (n y x) c")
    variances, axes = torch.linalg.eigh(torch.cov(latents.T))
    deviations = variances.clamp(min=0).sqrt()
    deviations = deviations.clamp(min=floor * deviations.median().item())
    forward, back = (axes / deviations) @ axes.T, (axes * deviations) @ axes.T
    last, first, c = vae.encoder.conv_out, vae.decoder.conv_in, len(axes)
    bias = last.get_parameter("bias")
    last.weight[:c] = torch.einsum("ij,jkyx->ikyx", forward, last.weight[:c])
    bias[:c] = forward @ bias[:c]
    bias[c:] += 2 * forward.norm(dim=1).log()  # the log variance, as far as channels are alike
    first.weight.copy_(torch.einsum("oikl,ij->ojkl", first.weight, back))


def frames_of_step(seed: int, step: int, count: int, height: int) -> Float[Tensor, "count 3 h w"]:
    """Fresh keyframes, RGB in [-1, 1]; a function of (seed, step) alone."""
    movies = (sample_movie(f"frames/{seed}/{step}/{i}", 1) for i in range(count))
    return to_tensor([render(m, m.shots[0], height) for m in movies])


def clip_frames(movie: Movie, setup: Setup, height: int, frames: int) -> Float[Tensor, "3 frames h w"]:
    """A shot of the toy world as RGB in [-1, 1]."""
    return rearrange(to_tensor(draw_clip(movie, setup, height, frames)), "t c h w -> c t h w")


def clips_of_step(seed: int, step: int, count: int, height: int, frames: int) -> Float[Tensor, "count 3 frames h w"]:
    """Fresh clips, RGB in [-1, 1]; a function of (seed, step) alone."""
    movies = (sample_movie(f"clips/{seed}/{step}/{i}", 1) for i in range(count))
    return torch.stack([clip_frames(m, m.shots[0], height, frames) for m in movies])


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "n 3 h w"]:
    """Pictures of one size as RGB in [-1, 1]."""
    pixels = rearrange([np.asarray(x.convert("RGB")) for x in images], "n h w c -> n c h w")
    return torch.from_numpy(pixels).float() / 127.5 - 1


def save_sheet(path: Path, frames: Float[Tensor, "n 3 h w"], columns: int) -> None:
    """Write frames, RGB in [-1, 1], as one picture, row by row."""
    save_image(frames.float(), path, nrow=columns, padding=0, normalize=True, value_range=(-1, 1))


def edge_error(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of horizontal and vertical gradients."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def psnr(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1], in dB."""
    error = (a.detach().float().clamp(-1, 1) - b.float()).square().mean()
    return float(10 * torch.log10(4 / error))
