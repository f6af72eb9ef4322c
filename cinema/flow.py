"""Rectified flow: straight paths from noise to data, and the sampler that walks them back.

One convention for time, everywhere: ``sigma = 1`` is noise, ``sigma = 0`` is data and ``velocity = noise - data``,
so ``x_sigma = data + sigma * velocity`` and dx/dsigma = velocity. Axes: `b` story, `p` pair.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

OnStep = Callable[[int], None] | None  # called with the number of finished steps


def add_noise(
    data: Float[Tensor, "b p *rest"], noise: Float[Tensor, "b p *rest"], sigma: Float[Tensor, "b p"]
) -> Float[Tensor, "b p *rest"]:
    """Walk each pair from its data towards noise: x = (1 - sigma) data + sigma noise, one sigma per pair.

    :eq:`eq-flow`: rectified flow (Liu et al. 2022, eq. 1), with the noise levels of diffusion forcing (paper,
    section 4). The sum is formed in the wider of the dtypes.
    """
    return torch.lerp(data, noise, sigma[(..., *[None] * (data.ndim - 2))].to(data.dtype))


def velocity(data: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The training target noise - data: the constant slope dx/dsigma of the straight path, :eq:`eq-velocity`."""
    return noise - data


def shift_time(sigma: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """Bend time towards noise: sigma' = shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, eq. 23).

    :eq:`eq-shift`. `shift` > 1 spends more of the time on noise, 1 changes nothing.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(shape: Sequence[int], generator: torch.Generator, shift: float = 1.0) -> Float[Tensor, "..."]:
    """Draw training noise levels in (0, 1): sigmoid of a normal, then shifted (Esser et al. 2024, eq. 19).

    :eq:`eq-noise`. `shape` is usually ``(b, p)``, an independent level per pair.
    """
    return shift_time(torch.randn(*shape, generator=generator).sigmoid(), shift)


def schedule(steps: int, shift: float = 1.0) -> Float[Tensor, "{steps}+1"]:
    """Noise levels of a sampling run, from 1 to 0.

    Equal to diffusers' FlowMatchEulerDiscreteScheduler given ``sigmas=linspace(1, 1 / steps, steps)``.
    """
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def euler(
    velocity_fn: Callable[[Tensor, float], Tensor],
    noise: Float[Tensor, "*shape"],
    sigmas: Float[Tensor, "n"],
    on_step: OnStep = None,
) -> Float[Tensor, "*shape"]:
    """Integrate dx/dsigma = velocity from `noise` along falling `sigmas`: x += (next - sigma) velocity.

    :eq:`eq-euler`. The velocity of (sample, sigma) may have any float dtype, the sum keeps that of `noise` (best
    float32).
    """
    x = noise
    for done, (here, there) in enumerate(pairwise(sigmas.tolist()), start=1):
        x = x + (there - here) * velocity_fn(x, here).to(x.dtype)
        if on_step is not None:
            on_step(done)
    return x
