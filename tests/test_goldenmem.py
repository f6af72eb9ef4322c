from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cinema.goldenmem import PHI, Layout, coordinates, levels, shrink, tokens

FIG_4 = {4: 5512, 8: 7824, 12: 8984, 16: 9696, 20: 10280, 24: 10824}  # pairs: tokens printed in the paper


@pytest.mark.parametrize(("pairs", "printed"), FIG_4.items())
def test_token_counts_of_figure_4(pairs: int, printed: int) -> None:
    assert Layout(pairs, side=25, count=6, group=4).tokens(text=128) == printed
    assert (
        Layout(pairs, side=25, count=1, group=pairs).tokens(text=128) == pairs * 1378
    )  # its naive row: 5512 ... 33072


def test_levels_use_the_direct_form() -> None:
    assert levels(25, 6) == (25, 15, 9, 5, 3, 2)
    assert levels(8, 4, ratio=2.0) == (8, 4, 2, 1)
    assert levels(27, 4, ratio=1.5) == (27, 18, 12, 8)  # exact divisions stay exact


@given(side=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_all_levels_together_stay_below_phi_times_the_newest(side: int) -> None:
    count = next(n for n in range(1, 20) if side / PHI**n < 1)
    assert sum(tokens(s) for s in levels(side, count)) < PHI * tokens(side)


def test_layout_puts_the_newest_pairs_at_the_finest_level() -> None:
    layout = Layout(pairs=5, side=25, count=3, group=2)
    assert layout.sides == (9, 15, 15, 25, 25)
    assert layout.by_level() == [(25, [3, 4]), (15, [1, 2]), (9, [0])]


def test_layout_by_rank_keeps_the_order_of_time() -> None:
    layout = Layout(pairs=4, side=25, count=2, group=2, rank=(1, 3, 2, 0))  # the oldest is the most important one
    assert layout.sides == (25, 15, 15, 25)
    assert layout.by_level() == [(25, [0, 3]), (15, [1, 2])]


def test_equal_levels_share_one_fold() -> None:
    assert Layout(pairs=5, side=8, count=5, group=1).by_level() == [(8, [4]), (4, [3]), (3, [2]), (1, [0, 1])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: levels(8, 2, ratio=1.0), "ratio between levels is 1.0"),
        (lambda: levels(8, 6), "6 levels are too many for 8 patches: level 5"),
        (lambda: Layout(0, 8, 3, 2), "at least one pair, not 0"),
        (lambda: Layout(7, 8, 3, 2), "7 pairs do not fit in 3 levels of 2"),
        (lambda: shrink(torch.zeros(1, 3, 64, 100), 1), "64 x 100 pixels"),
        (lambda: shrink(torch.zeros(1, 3, 64, 128), 0), "level of 0 patches"),
        (lambda: shrink(torch.zeros(1, 3, 64, 128), 5), "level of 5 patches does not fit a frame 4"),
    ],
)
def test_errors_carry_the_numbers(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_shrink_keeps_the_mean_of_each_area() -> None:
    frames = torch.rand(2, 3, 64, 128) * 2 - 1
    small = shrink(frames, 2)
    assert small.shape == (2, 3, 32, 64)
    assert torch.allclose(small[..., 3, 5], frames[..., 6:8, 10:12].mean((-1, -2)), atol=1e-6)
    assert torch.equal(shrink(frames, 4), frames)


@pytest.mark.parametrize("side", [8, 5, 4, 3, 1])
def test_coordinates_of_every_level_cover_the_same_extent(side: int) -> None:
    ids, cell = coordinates(side, 8), 8 / side
    assert ids.shape == (tokens(side), 2)
    assert torch.allclose(ids.amin(0), torch.tensor(cell / 2 - 0.5))
    assert torch.allclose(ids.amax(0) + cell / 2, torch.tensor([7.5, 15.5]))  # the outer edges coincide
    assert torch.allclose(ids.mean(0), coordinates(8, 8).mean(0), atol=1e-5)  # sums of float32


def test_finest_coordinates_are_those_of_the_flux_pipeline() -> None:
    from diffusers import FluxPipeline

    stock = FluxPipeline._prepare_latent_image_ids(1, 8, 16, "cpu", torch.float32)
    assert torch.equal(coordinates(8, 8), stock[:, 1:])


def test_a_ratio_for_each_step_multiplies_up() -> None:
    assert levels(25, 4, (5 / 3, 1.5, 2.0)) == (25, 15, 10, 5)
    assert Layout(5, 8, 3, 2, (8 / 7, 7 / 2)).sides == (2, 7, 7, 8, 8)
    assert levels(8, 4, (8 / 6, 6.0, 1.0)) == (8, 6, 1, 1)
    for ratios in [(1.5,), (1.5, 0.9)]:
        with pytest.raises(ValueError, match="above 1, or from 1 on for each of 2 steps"):
            levels(25, 3, ratios)


def test_raw_coordinates_count_the_patches_of_a_small_level() -> None:
    assert torch.equal(coordinates(2, 8, extent=False), coordinates(2, 2))
    assert coordinates(2, 8)[-1].tolist() == [5.5, 13.5]


@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.floats(1.01, 3.0), st.integers(1, 96), st.integers(1, 96), st.booleans())
def test_every_pair_has_one_level_and_who_ranks_higher_is_no_smaller(data, side, ratio, pairs, group, ranked) -> None:
    count = data.draw(st.integers(1, 8).filter(lambda n: side / ratio ** (n - 1) >= 1))
    rank = tuple(data.draw(st.permutations(range(pairs)))) if ranked else None
    layout = Layout(pairs, side, count, max(group, -(-pairs // count)), ratio, rank)
    by_rank = [s for _, s in sorted(zip(rank or range(pairs - 1, -1, -1), layout.sides, strict=True))]
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[0] == side
    assert sorted(i for _, places in layout.by_level() for i in places) == list(range(pairs))
    assert all(layout.sides[i] == s for s, places in layout.by_level() for i in places)


@given(st.integers(1, 60), st.integers(1, 96), st.integers(1, 96))
def test_images_cost_less_than_phi_times_as_many_newest_as_share_a_level(side: int, pairs: int, group: int) -> None:
    count = next(n for n in range(60, 0, -1) if floor(side / PHI ** (n - 1) + 1e-9) >= 1)
    assert Layout(min(pairs, count * group), side, count, group).tokens() < PHI * group * tokens(side)
