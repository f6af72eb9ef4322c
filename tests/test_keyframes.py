from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline
from PIL import Image

import cinema.keyframes
from cinema.errors import UserError
from cinema.keyframes import KeyframePlanner, decode_tokens, encode_frames, rename, to_image, to_tensor
from cinema.story import Character, Shot, Story
from cinema.transformer import InterleavedFluxTransformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def planner(folder: Path) -> KeyframePlanner:
    return KeyframePlanner.from_preset(tiny.preset(folder))


def story(*captions: str, tags: tuple[str, ...] = ("<ada>", "<bo>")) -> Story:
    return Story(title="a test", cast=[Character(tag=t) for t in tags], shots=[Shot(caption=c) for c in captions])


SHOTS = [f"{size} shot, {place} <ada> left, jumping." for size in ("wide", "close") for place in ("forest.", "city.")]
FIVE = story(*SHOTS, "<bo>")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a: Image.Image, b: Image.Image) -> bool:
    """Equal but for rounding: float32 sums in another order may move a value across the edge of a grey level."""
    return bool(np.abs(pixels(a) - pixels(b)).max() <= 1)


def test_a_single_keyframe_equals_the_stock_pipeline(folder: Path, planner: KeyframePlanner) -> None:
    stock = FluxPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 32, tiny.CHANNELS, generator=cinema.keyframes.seeded(3, 0))
    expected = stock(
        FIVE.shots[0].caption,
        height=64,
        width=128,
        num_inference_steps=2,
        guidance_scale=3.5,
        latents=noise,
        max_sequence_length=10,
    ).images[0]
    [ours] = planner.plan(story(FIVE.shots[0].caption), seed=3)
    assert ours.image.size == (128, 64) and ours.remembered == []
    assert pixels(expected).std() > 1 and same(ours.image, expected)


def test_the_same_seed_gives_the_same_keyframes_and_another_others(planner: KeyframePlanner) -> None:
    first, again, other = planner.plan(FIVE, 1), planner.plan(FIVE, 1), planner.plan(FIVE, 2)
    assert all(np.array_equal(pixels(a.image), pixels(b.image)) for a, b in zip(first, again, strict=True))
    assert not any(same(a.image, b.image) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("missing", [{4}, {2}, {2, 3, 4}])  # the last one, one in between, the rest of a killed run
def test_known_keyframes_are_kept_and_the_others_come_out_the_same(planner: KeyframePlanner, missing: set[int]) -> None:
    whole, calls = planner.plan(FIVE), []
    known = {k.index: k.image for k in whole if k.index not in missing}
    again = planner.plan(FIVE, known=known, on_progress=lambda *told: calls.append(told))
    assert all(np.array_equal(pixels(a.image), pixels(b.image)) for a, b in zip(whole, again, strict=True))
    steps = 2 * len(missing)
    assert [c[:2] for c in calls] == [(i + 1, steps) for i in range(steps)]
    assert calls[0][2] == f"keyframe {min(missing) + 1} of 5"


def test_memory_holds_the_newest_at_golden_levels(planner: KeyframePlanner) -> None:
    remembered = [k.remembered for k in planner.plan(FIVE)]
    assert remembered == [[], [(0, 4)], [(0, 2), (1, 4)], [(0, 2), (1, 2), (2, 4)], [(1, 2), (2, 2), (3, 4)]]


def test_what_is_remembered_changes_what_is_drawn(planner: KeyframePlanner) -> None:
    known = {0: Image.new("RGB", (128, 64), "red")}, {0: Image.new("RGB", (300, 100), "blue")}
    red, blue = (planner.plan(FIVE, known=k) for k in known)
    assert blue[0].image.size == (128, 64)
    assert not np.array_equal(pixels(red[1].image), pixels(blue[1].image))


def test_memory_is_noised_by_the_context_s_sigma(planner: KeyframePlanner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is (1 - sigma) clean + sigma noise, the noise of this seed and shot."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        planner.transformer,
        "encode_context",
        lambda groups, **told: (
            seen.append(groups[0].latents),
            InterleavedFluxTransformer.encode_context(planner.transformer, groups, **told),
        )[1],
    )
    known = {0: Image.new("RGB", (128, 64), "red")}
    told = story("<ada>", "x")
    for sigma in (0.0, 0.25, 1.0):
        monkeypatch.setattr(planner, "settings", replace(planner.settings, context_sigma=sigma))
        planner.plan(told, known=known)
    clean, mixed, noise = seen
    assert torch.allclose(mixed, torch.lerp(clean, noise, 0.25), atol=1e-6)
    assert noise.std() > 0.5 and not torch.allclose(clean, noise, atol=0.1)


def test_memory_of_one_pair_remembers_nothing(folder: Path) -> None:
    alone = KeyframePlanner.from_preset(tiny.preset(folder, memory_levels=1, memory_group=1))
    assert [k.remembered for k in alone.plan(FIVE)] == [[]] * 5


def test_drawing_on_the_cache_equals_running_all_pairs_in_every_step(
    planner: KeyframePlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = planner.plan(FIVE)
    joint, context = InterleavedFluxTransformer.forward_pairs, []
    monkeypatch.setattr(
        planner.transformer, "encode_context", lambda groups, **_: context.__setitem__(slice(None), groups)
    )

    def recompute(groups, causal, cache, guidance):
        return joint(planner.transformer, [*groups, *context], causal, None, guidance)

    monkeypatch.setattr(planner.transformer, "forward_pairs", recompute)
    assert all(same(a.image, b.image) for a, b in zip(cached, planner.plan(FIVE), strict=True))
    assert len(context) == 2


def test_guidance_extrapolates_from_the_empty_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    decode = cinema.keyframes.decode_tokens
    monkeypatch.setattr(cinema.keyframes, "decode_tokens", lambda v, x, s: (drawn.append(x), decode(v, x, s))[1])
    context = {0: Image.new("RGB", (128, 64), "red")}
    for caption, guidance in (
        (FIVE.shots[1].caption, 1.0),
        ("", 1.0),
        (FIVE.shots[1].caption, 3.0),
    ):
        planner = KeyframePlanner.from_preset(tiny.preset(folder, steps=1, guidance=guidance))
        told = story("<ada>", "x")
        told.shots[1].__dict__["caption"] = caption  # the empty one, too, which no story may have
        planner.plan(told, known=context)
    with_caption, without, guided = drawn
    assert not torch.allclose(with_caption, without, atol=1e-3)
    assert torch.allclose(guided, without + 3 * (with_caption - without), atol=1e-4)  # a difference, times three


@torch.no_grad()
def test_frames_are_packed_and_scaled_as_the_stock_pipeline_does(planner: KeyframePlanner) -> None:
    frames = torch.rand(2, 3, 64, 128) * 2 - 1
    latents = (planner.vae.encode(frames).latent_dist.mode() - 0.1) * 0.4
    tokens = encode_frames(planner.vae, frames)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 8, 16))
    stock = planner.vae.decode(latents / 0.4 + 0.1).sample
    assert torch.allclose(decode_tokens(planner.vae, tokens, 4), stock, atol=1e-5)  # convolutions in another layout


def test_pictures_survive_the_way_to_tensors_and_back() -> None:
    values = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert np.array_equal(np.asarray(to_image(to_tensor(Image.fromarray(values)))), values)


def test_tags_are_mapped_in_the_order_of_the_cast() -> None:
    mine = story("<zoe> meets <bo>.", "<yan>, <zoe>: <zoe>.", tags=("<zoe>", "<bo>", "<yan>"))
    assert rename(mine, ("<ada>", "<bo>", "<cleo>")) == ["<ada> meets <bo>.", "<cleo>, <ada>: <ada>."]
    assert rename(mine, ()) == [shot.caption for shot in mine.shots]
    with pytest.raises(UserError, match="3 characters, but these weights know 2 names"):
        rename(mine, ("<ada>", "<bo>"))


def test_keyframes_tell_the_caption_that_was_read(planner: KeyframePlanner) -> None:
    [keyframe] = planner.plan(story("close shot, <zoe>", tags=("<zoe>",)))
    assert keyframe.caption == "close shot, <ada>"


def test_a_long_caption_warns(planner: KeyframePlanner) -> None:
    with pytest.warns(UserWarning, match="has 21 tokens and only 10 are read"):
        planner.plan(story("left, " * 20))


def test_weights_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Flux pipeline is there") as caught:
        KeyframePlanner.from_preset(tiny.preset(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_broken_are_one_sentence(tmp_path: Path) -> None:
    weights = tiny.pipeline_folder(tmp_path)
    broken = weights / "transformer" / "diffusion_pytorch_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(UserError, match="the keyframe weights cannot be loaded") as caught:
        KeyframePlanner.from_preset(tiny.preset(weights))
    assert "\n" not in str(caught.value)


def test_a_shape_that_golden_levels_cannot_have_is_refused(folder: Path) -> None:
    for size in ({"width": 96}, {"height": 60, "width": 120}):
        with pytest.raises(UserError, match=r"the height must be a multiple of 16, the width its double"):
            KeyframePlanner.from_preset(tiny.preset(folder, **size))


def test_bfloat16_weights_draw_almost_the_same(folder: Path, planner: KeyframePlanner) -> None:
    half = KeyframePlanner.from_preset(replace(tiny.preset(folder), dtype="bfloat16"))
    assert half.transformer.dtype == torch.bfloat16
    a, b = planner.plan(FIVE)[4].image, half.plan(FIVE)[4].image
    assert np.abs(pixels(a) - pixels(b)).mean() < 8  # of 255; 8 bits of mantissa through two networks


def test_what_is_retrieved_is_remembered_beside_the_newest_and_keeps_its_place_in_time(folder: Path) -> None:
    preset = tiny.preset(folder)
    small = replace(preset.keyframes, memory_levels=2, memory_group=2)
    film = story("<ada> left.", "<bo> left.", "<bo> right.", "<bo> left.", "<bo> right.", "<ada> right.")
    remembered = {}
    for name in ("recency", "oracle", "t5"):
        chosen = replace(preset, keyframes=replace(small, retrieval=name))
        remembered[name] = KeyframePlanner.from_preset(chosen).plan(film)[-1].remembered
    fine, coarse = remembered["recency"][-1][1], remembered["recency"][0][1]
    assert fine > coarse
    assert remembered["recency"] == [(2, coarse), (3, coarse), (4, fine)]
    assert remembered["oracle"] == [(0, coarse), (3, coarse), (4, fine)]  # by rank 4, 0, 3; two at each level
    assert len(remembered["t5"]) == 3 and remembered["t5"][-1] == (4, fine)


def test_an_unknown_retrieval_is_one_sentence(folder: Path) -> None:
    preset = tiny.preset(folder)
    wrong = replace(preset, keyframes=replace(preset.keyframes, retrieval="magic"))
    with pytest.raises(UserError, match="no retrieval 'magic'; choose one of recency, clip, t5, random, oracle"):
        KeyframePlanner.from_preset(wrong).plan(FIVE)


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_a_window_is_drawn_together_and_only_the_full_mask_sees_ahead(folder: Path, mask: str) -> None:
    """The last caption of a window of three is changed: with the full mask the first picture hears of it."""
    planner = KeyframePlanner.from_preset(tiny.preset(folder, window=3, mask=mask, memory_levels=3))
    told = [shot.caption for shot in FIVE.shots]
    a, b = planner.plan(FIVE), planner.plan(story(*told[:2], "close shot, city.", *told[3:]))
    equal = [np.array_equal(pixels(x.image), pixels(y.image)) for x, y in zip(a, b, strict=True)]
    assert equal[:3] == [mask == "causal"] * 2 + [False]
    assert [k.remembered for k in a] == [[]] * 3 + [[(0, 1), (1, 2), (2, 2)]] * 2


def test_a_window_goes_on_from_what_is_kept_and_is_drawn_whole(folder: Path) -> None:
    planner = KeyframePlanner.from_preset(tiny.preset(folder, window=2))
    whole, asked = planner.plan(FIVE), list[int]()
    recipes = {k.recipe: k.image for k in whole if k.index != 3}

    def keep(shot: int, recipe: str) -> Image.Image | None:
        asked.append(shot)
        return recipes.get(recipe)

    again = list(planner.iterate(FIVE, keep=keep))
    assert asked == [0, 1, 2, 3, 4] and all(same(a.image, b.image) for a, b in zip(whole, again, strict=True))
    assert len({k.recipe for k in whole}) == 5
