"""The video autoencoder: a small `AutoencoderKLLTXVideo`, trained on clips of the toy world.

Its latents have LTX-Video's 128 channels, for 16 x 16 pixels of 4 frames: half of LTX-Video's strides, because toy
frames are small and a first frame has to be its keyframe. The first latent frame sees the first picture only, and the
decoder is causal too, so a shot's first frame depends on its keyframe's latent alone.
Axes: `b` clips, `t` frames, `c` channels, `h w` pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cinema.config import TOY
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, Setup, sample_movie
from cinema.training.autoencoder import AutoencoderLearner, edge_error, narrow, plain_state, psnr, to_image, to_tensor
from cinema.training.config import Stage


class VideoAutoencoderTask:
    """Clips to latents and back: absolute and squared error, edges, a little KL.

    Args:
        stills: first so many steps train on single frames, four for a clip: cheap, and the first frame comes first.
        first: extra weight of the first frame, which has to be its keyframe.
        motion: extra weight of pixels that differ from the first frame.
    """

    kl, edges = 1e-5, 0.5  # weights in the loss

    def __init__(
        self,
        seed: int,
        init: str | None,
        height: int = TOY.video.height,
        frames: int = TOY.video.frames,
        stills: int = 0,
        first: float = 4.0,
        motion: float = 2.0,
        **shape: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.seed, self.height, self.frames = seed, height, frames
        self.stills, self.first, self.motion = stills, first, motion
        vae = AutoencoderKLLTXVideo.from_pretrained(init) if init else small_video_autoencoder(**shape)
        self.model = AutoencoderLearner(vae)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Error of reconstructing this step's clips from a sample of their latents."""
        device = next(model.parameters()).device
        count, frames = (4 * stage.batch, 1) if step < self.stills else (stage.batch, self.frames)
        clips = clips_of_step(self.seed, step, count, self.height, frames).to(device)
        decoded, kl = model(clips, torch.Generator(device).manual_seed(step))
        difference, weight = decoded - clips, self._weight(clips)
        pixel = (weight * (difference.abs() + 2 * difference.square())).mean() / weight.mean()
        firsts = decoded[:, :, 0], clips[:, :, 0]
        pictures = (rearrange(x, "b c t h w -> (b t) c h w") for x in (decoded, clips))
        edge = edge_error(*pictures) + self.first * edge_error(*firsts)
        loss = pixel + self.edges * edge / (1 + self.first) + self.kl * kl
        return loss, {"psnr": psnr(decoded, clips), "psnr_first": psnr(*firsts), "kl": kl.item()}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Measure mean and standard deviation of the latents' channels on fresh clips, then write the folder."""
        vae = AutoencoderKLLTXVideo.from_config(self.model.vae.config)
        vae.load_state_dict(plain_state(self.model.vae))
        clips = (clips_of_step(self.seed, 10**7 + i, 4, self.height, self.frames) for i in range(8))
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in clips])
        vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
        vae.latents_std.copy_(latents.std((0, 2, 3, 4)))
        vae.to(torch.bfloat16).save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """First, middle and last frames of fresh clips above their reconstructions."""
        clips = clips_of_step(self.seed, 10**7 + 100, 3, self.height, self.frames).to(self.model.vae.device)
        decoded = self.model.vae.decode(self.model.vae.encode(clips).latent_dist.mode()).sample
        shown = torch.stack([clips, decoded])[:, :, :, [0, self.frames // 2, self.frames - 1]]
        to_image(rearrange(shown, "two b c t h w -> c (b two h) (t w)")).save(path)

    def _weight(self, clips: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 1 t h w"]:
        moved = ((clips - clips[:, :, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        weight = 1 + self.motion * moved
        weight[:, :, 0] += self.first
        return weight


def small_video_autoencoder(
    channels: Sequence[int] = (32, 128, 256),
    layers: Sequence[int] = (1, 0, 0),
    decoder_channels: Sequence[int] = (32, 128),
    decoder_layers: Sequence[int] = (1, 1, 0),
    upsample_factor: Sequence[int] = (1, 4),
    latent_channels: int = 128,
) -> AutoencoderKLLTXVideo:
    """An `AutoencoderKLLTXVideo` with few parameters and half of LTX-Video's strides: 4 frames x 16 x 16 pixels.

    Built of LTX-Video 0.9.5's blocks, which move pixels into channels and back past every convolution. No noise is
    injected and the decoder knows no time.
    """
    blocks = len(decoder_channels)
    # fmt: off
    vae = AutoencoderKLLTXVideo(
        latent_channels=latent_channels, block_out_channels=tuple(channels), layers_per_block=tuple(layers),
        down_block_types=("LTXVideo095DownBlock3D",) * blocks, downsample_type=("spatiotemporal",) * blocks,
        spatio_temporal_scaling=(True,) * blocks, decoder_block_out_channels=tuple(decoder_channels),
        decoder_spatio_temporal_scaling=(True,) * blocks, decoder_layers_per_block=tuple(decoder_layers),
        decoder_inject_noise=(False,) * (blocks + 1), upsample_residual=(True,) * blocks,
        upsample_factor=tuple(upsample_factor), timestep_conditioning=False, decoder_causal=True,
    )
    # fmt: on
    narrow(vae.encoder.conv_out.conv, latent_channels)
    return vae


def clip_frames(movie: Movie, setup: Setup, height: int, frames: int) -> Float[Tensor, "3 frames h w"]:
    """A shot of the toy world as RGB in [-1, 1]."""
    moments = [render(movie, setup, height, time=i / max(1, frames - 1)) for i in range(frames)]
    return rearrange(to_tensor(moments), "t c h w -> c t h w")


def clips_of_step(seed: int, step: int, count: int, height: int, frames: int) -> Float[Tensor, "count 3 frames h w"]:
    """Fresh clips, RGB in [-1, 1]; a function of (seed, step) alone."""
    movies = (sample_movie(f"clips/{seed}/{step}/{i}", 1) for i in range(count))
    return torch.stack([clip_frames(m, m.shots[0], height, frames) for m in movies])
