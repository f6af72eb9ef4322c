import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from cinema.flow import add_noise, euler, sample_sigma, schedule, shift_time, velocity


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 5, 4, generator=g), torch.randn(2, 3, 5, 4, generator=g)


def test_sigma_one_is_noise_and_sigma_zero_is_data() -> None:
    data, noise = pairs()
    sigma = torch.tensor([[0.0, 1.0, 0.25], [1.0, 0.0, 0.5]])
    x = add_noise(data, noise, sigma)
    assert torch.equal(x[0, 0], data[0, 0]) and torch.equal(x[1, 1], data[1, 1])
    assert torch.equal(x[0, 1], noise[0, 1]) and torch.equal(x[1, 0], noise[1, 0])
    assert torch.allclose(x[0, 2], 0.75 * data[0, 2] + 0.25 * noise[0, 2], atol=1e-6)


def test_velocity_is_the_slope_of_the_path_and_points_from_data_to_noise() -> None:
    data, noise = pairs()
    low, high = torch.full((2, 3), 0.2), torch.full((2, 3), 0.7)
    slope = (add_noise(data, noise, high) - add_noise(data, noise, low)) / 0.5
    assert torch.allclose(slope, velocity(data, noise), atol=1e-5)  # a difference of rounded sums over 0.5


def test_noising_agrees_with_diffusers() -> None:
    data, noise = pairs()
    scheduler = FlowMatchEulerDiscreteScheduler()
    at = torch.tensor([100, 500, 900])
    stock = scheduler.scale_noise(data.flatten(0, 1), scheduler.timesteps[at].repeat(2), noise.flatten(0, 1))
    ours = add_noise(data, noise, scheduler.sigmas[at].repeat(2, 1))
    assert torch.allclose(ours.flatten(0, 1), stock, atol=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 1.0), (16, 2.0), (28, 3.0)])
def test_schedule_and_euler_agree_with_diffusers(steps: int, shift: float) -> None:
    _, noise = pairs()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    assert torch.allclose(schedule(steps, shift), scheduler.sigmas, atol=1e-6)
    stock = noise
    for t in scheduler.timesteps:
        stock = scheduler.step(torch.sin(stock) + t / 1000, t, stock).prev_sample
    ours = euler(lambda x, sigma: torch.sin(x) + sigma, noise, schedule(steps, shift))
    assert torch.allclose(ours, stock, atol=1e-5)  # sums in another order over `steps` steps


def test_one_step_along_the_true_velocity_arrives_at_the_data() -> None:
    data, noise = pairs()
    seen: list[int] = []
    assert torch.allclose(euler(lambda x, s: velocity(data, noise), noise, schedule(3), seen.append), data, atol=1e-6)
    assert seen == [1, 2, 3]


def test_shift_moves_time_towards_noise_and_keeps_its_ends() -> None:
    time = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(time, 1.0), time)
    assert torch.equal(shift_time(time, 3.0)[[0, -1]], time[[0, -1]])
    assert (shift_time(time, 3.0)[1:-1] > time[1:-1]).all()


def test_sampled_sigmas_are_logit_normal_per_pair_and_repeatable() -> None:
    draw = lambda: sample_sigma((4000, 2), torch.Generator().manual_seed(1))  # noqa: E731
    sigma = draw()
    assert torch.equal(sigma, draw()) and sigma.min() > 0 and sigma.max() < 1
    logit = torch.logit(sigma.double())
    assert abs(logit.mean()) < 0.05 and abs(logit.std() - 1) < 0.05  # four standard errors of 8,000 draws
    assert abs(torch.corrcoef(sigma.T)[0, 1]) < 0.07


def test_sampled_sigmas_are_shifted_as_time_is() -> None:
    straight, shifted = (sample_sigma((100, 2), torch.Generator().manual_seed(1), shift=shift) for shift in (1.0, 3.0))
    assert torch.allclose(shifted, shift_time(straight, 3.0)) and shifted.median() > straight.median()
