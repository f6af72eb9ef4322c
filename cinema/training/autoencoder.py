"""The image autoencoder: a small `AutoencoderKL`, trained on frames of the toy world."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.config import Stage


class AutoencoderLearner(nn.Module):
    """What is trained: frames through a sample of their latents and back."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, frames: Float[Tensor, "n 3 h w"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n c y x"], Float[Tensor, "n c y x"]]:
        """Decoded frames, and the latents' mean and log variance, in float32."""
        posterior = self.vae.encode(frames.to(self.vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=frames.device)
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        return self.vae.decode(latents).sample.float(), posterior.mean.float(), posterior.logvar.float()


class AutoencoderTask:
    """Pixels to latents of 1/8 the size and back: absolute and squared error, edges, a little KL."""

    def __init__(
        self, seed: int, init: str | None, height: int = 128, kl: float = 1e-4, edges: float = 0.5, **shape: Any
    ) -> None:
        self.seed, self.height, self.kl, self.edges = seed, height, kl, edges
        torch.manual_seed(seed)
        self.model = AutoencoderLearner(AutoencoderKL.from_pretrained(init) if init else small_autoencoder(**shape))
        flatten_kernels(self.model)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Error of reconstructing this step's frames from a sample of their latents."""
        device = next(model.parameters()).device
        frames = frames_of_step(self.seed, step, stage.batch, self.height).to(device)
        decoded, mean, logvar = model(frames, torch.Generator(device).manual_seed(step))
        pixel = (decoded - frames).abs().mean() + 2 * (decoded - frames).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
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
        vae.register_to_config(
            shift_factor=round(latents.mean().item(), 5), scaling_factor=round(1 / latents.std().item(), 5)
        )
        vae.to(torch.bfloat16).save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Frames above their reconstructions."""
        frames = frames_of_step(self.seed, 10**7 + 1, 6, self.height)
        decoded = self.model.vae.decode(self.model.vae.encode(frames).latent_dist.mode()).sample
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(rearrange([frames, decoded], "two (y x) c h w -> c (y two h) (x w)", x=3)).save(path)


@torch.no_grad()
def whiten(vae: AutoencoderKL, frames: Float[Tensor, "n 3 h w"], floor: float = 0.5) -> None:
    """Decorrelate the latents' channels, by a matrix folded into the encoder's last and the decoder's first layer.

    Decoded pictures stay the same. Without it most of the latents' variance is colour: a frame's palette then shows
    through almost any noise, and a model that can look does not learn to read it from the caption.

    Args:
        frames: to measure the channels' covariance on.
        floor: channels weaker than this share of the median are not amplified beyond it.
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


class _Kernel(nn.Module):
    """A matrix seen as a convolution's kernel."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, matrix: Tensor) -> Tensor:
        """Matrix (out, in k k) → kernel (out, in, k, k)."""
        return matrix.reshape(self.shape)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        """Kernel → matrix."""
        return kernel.flatten(1)


def flatten_kernels(model: nn.Module) -> None:
    """Keep the kernels of convolutions inside blocks as matrices, so that Muon takes them."""
    for name, module in list(model.named_modules()):
        if "blocks." in name and isinstance(module, nn.Conv2d | nn.Conv3d):
            parametrize.register_parametrization(module, "weight", _Kernel(module.weight.shape))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict with kernels under their usual names and shapes again."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            del state[f"{name}.parametrizations.weight.original"]
            state[f"{name}.weight"] = module.weight.detach()
    return state


def small_autoencoder(
    channels: Sequence[int] = (16, 32, 64, 128), latent_channels: int = 16, layers: int = 1
) -> AutoencoderKL:
    """An `AutoencoderKL` with FLUX's latent layout (16 channels at 1/8) and few parameters.

    One norm group: several groups of few channels each would normalise colour away. The posterior starts narrow.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.encoder.conv_out.weight[latent_channels:] *= 0.1
        vae.encoder.conv_out.bias[latent_channels:] = -6.0
    return vae


def frames_of_step(seed: int, step: int, count: int, height: int) -> Float[Tensor, "count 3 h w"]:
    """Fresh keyframes, RGB in [-1, 1]; a function of (seed, step) alone."""
    movies = (sample_movie(f"frames/{seed}/{step}/{i}", 1) for i in range(count))
    return to_tensor([render(m, m.shots[0], height) for m in movies])


def to_tensor(images: list[Image.Image]) -> Float[Tensor, "n 3 h w"]:
    """Pictures of one size as RGB in [-1, 1]."""
    array = np.stack([np.asarray(x.convert("RGB")) for x in images])
    return rearrange(torch.from_numpy(array), "n h w c -> n c h w").float() / 127.5 - 1


def to_image(frame: Float[Tensor, "3 h w"]) -> Image.Image:
    """RGB in [-1, 1] as a picture."""
    array = rearrange(((frame.float() + 1) * 127.5).round().clamp(0, 255).byte(), "c h w -> h w c")
    return Image.fromarray(array.cpu().numpy())


def edge_error(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of horizontal and vertical gradients."""
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def psnr(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1], in dB."""
    error = (a.detach().float().clamp(-1, 1) - b.float()).square().mean()
    return float(10 * torch.log10(4 / error))
