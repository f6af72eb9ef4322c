"""The image autoencoder: a small `AutoencoderKL`, trained on frames; its learner and losses serve video's too."""

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
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cinema import keyframes
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.config import Stage


class AutoencoderLearner(nn.Module):
    """What is trained: frames or clips through a sample of their latents and back."""

    def __init__(self, vae: AutoencoderKL | AutoencoderKLLTXVideo) -> None:
        super().__init__()
        self.vae = vae
        flatten_kernels(self)

    def forward(
        self, frames: Float[Tensor, "n 3 *size"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n 3 *size"], Float[Tensor, ""]]:
        """Decoded frames, and the KL divergence of their latents from a normal distribution, in float32."""
        posterior = self.vae.encode(frames.to(next(self.parameters()).dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=frames.device)
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return self.vae.decode(latents).sample.float(), 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class AutoencoderTask:
    """Pixels to latents of 1/8 the size and back: absolute and squared error, edges, a little KL."""

    kl, edges = 1e-4, 0.5  # weights in the loss

    def __init__(self, seed: int, init: str | None, height: int = 128, **shape: Any) -> None:
        self.seed, self.height = seed, height
        torch.manual_seed(seed)
        self.model = AutoencoderLearner(AutoencoderKL.from_pretrained(init) if init else small_autoencoder(**shape))

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Error of reconstructing this step's frames from a sample of their latents."""
        device = next(model.parameters()).device
        frames = frames_of_step(self.seed, step, stage.batch, self.height).to(device)
        decoded, kl = model(frames, torch.Generator(device).manual_seed(step))
        pixel = (decoded - frames).abs().mean() + 2 * (decoded - frames).square().mean()
        loss = pixel + self.edges * edge_error(decoded, frames) + self.kl * kl
        return loss, {"psnr": psnr(decoded, frames), "kl": kl.item()}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Whiten the latents, measure their shift and scale on fresh frames, and write the autoencoder's folder."""
        vae = AutoencoderKL.from_config(self.model.vae.config)
        vae.load_state_dict(plain_state(self.model.vae))
        frames = frames_of_step(self.seed, 10**7, 64, self.height)
        whiten(vae, frames)
        latents = vae.encode(frames).latent_dist.mode()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))
        vae.to(torch.bfloat16).save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Frames above their reconstructions."""
        frames = frames_of_step(self.seed, 10**7 + 1, 6, self.height).to(self.model.vae.device)
        decoded = self.model.vae.decode(self.model.vae.encode(frames).latent_dist.mode()).sample
        to_image(rearrange([frames, decoded], "two (y x) c h w -> c (y two h) (x w)", x=3)).save(path)


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


class _Kernel(nn.Unflatten):
    """A matrix (out, in k k) seen as a convolution's kernel (out, in, k, k)."""

    def right_inverse(self, kernel: Tensor) -> Tensor:
        """Kernel → matrix."""
        return kernel.flatten(1)


def flatten_kernels(model: nn.Module) -> None:
    """Keep the kernels of convolutions inside blocks as matrices, so that Muon takes them."""
    for name, module in list(model.named_modules()):
        if "blocks." in name and isinstance(module, nn.Conv2d | nn.Conv3d):
            parametrize.register_parametrization(module, "weight", _Kernel(1, module.weight.shape[1:]))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict with kernels under their usual names and shapes again."""
    flat = [(n, m) for n, m in model.named_modules() if parametrize.is_parametrized(m, "weight")]
    kernels = {f"{name}.weight": module.weight.detach() for name, module in flat}
    return {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k} | kernels


def small_autoencoder(
    channels: Sequence[int] = (16, 32, 64, 128), latent_channels: int = 16, layers: int = 1
) -> AutoencoderKL:
    """An `AutoencoderKL` with FLUX's latent layout (16 channels at 1/8) and few parameters.

    One norm group: several groups of few channels each would normalise colour away.
    """
    # fmt: off
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels), layers_per_block=layers, latent_channels=latent_channels,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )
    # fmt: on
    narrow(vae.encoder.conv_out, latent_channels)
    return vae


@torch.no_grad()
def narrow(last: nn.Module, latent_channels: int) -> None:
    """Begin with a narrow posterior: an encoder's last layer says small variances."""
    last.get_parameter("weight")[latent_channels:] *= 0.1
    last.get_parameter("bias")[latent_channels:] = -6.0


def frames_of_step(seed: int, step: int, count: int, height: int) -> Float[Tensor, "count 3 h w"]:
    """Fresh keyframes, RGB in [-1, 1]; a function of (seed, step) alone."""
    movies = (sample_movie(f"frames/{seed}/{step}/{i}", 1) for i in range(count))
    return to_tensor([render(m, m.shots[0], height) for m in movies])


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "n 3 h w"]:
    """Pictures of one size as RGB in [-1, 1]."""
    pixels = rearrange([np.asarray(x.convert("RGB")) for x in images], "n h w c -> n c h w")
    return torch.from_numpy(pixels).float() / 127.5 - 1


def to_image(frame: Float[Tensor, "3 h w"]) -> Image.Image:
    """RGB in [-1, 1] as a picture."""
    return keyframes.to_image(frame[None])


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size as one picture."""
    return to_image(rearrange([to_tensor(row) for row in rows], "y x c h w -> c (y h) (x w)"))


def edge_error(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of horizontal and vertical gradients."""
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def psnr(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1], in dB."""
    error = (a.detach().float().clamp(-1, 1) - b.float()).square().mean()
    return float(10 * torch.log10(4 / error))
