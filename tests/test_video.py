from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import tiny_video
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.pipelines.ltx import pipeline_ltx_condition
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cinema.errors import UserError
from cinema.flow import schedule
from cinema.keyframes import seeded, to_tensor
from cinema.story import Character, Shot, Story
from cinema.video import Animator, Window, decode_clips, encode_clips, global_caption, shot_frames, window_velocity

CAPTIONS = ["wide shot, forest. <ada> left, jumping.", "close shot, city. <bo> right, jumping.", "wide shot, city."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_video.pipeline_folder(tmp_path_factory.mktemp("video"))


@pytest.fixture
def animator(folder: Path) -> Animator:
    return Animator.from_preset(tiny_video.preset(folder, folder))


def story(captions: list[str] = CAPTIONS, **shot: object) -> Story:
    cast = [Character(tag="<ada>", description="red round, crown"), Character(tag="<bo>", description="blue tall, bow")]
    return Story(title="a test", cast=cast, shots=[Shot(caption=c, **shot) for c in captions])


def pictures(count: int = 3) -> list[Image.Image]:
    return [Image.linear_gradient("L").resize((128, 64)).convert("RGB").rotate(40 * i) for i in range(count)]


def inputs(window: Window, captions: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, size = torch.Generator().manual_seed(seed), sum(window.sizes)
    tokens, states = torch.randn(1, size, 8, generator=g), torch.randn(1, captions, 5, tiny.TEXT, generator=g)
    words = torch.ones(1, captions, 5, dtype=torch.bool)
    words[:, :, 4:] = False
    return tokens, torch.rand(1, size, generator=g), states, words


def bytes_of(shots: list[tuple[int, list[Image.Image]]]) -> dict[int, list[bytes]]:
    return {i: [frame.tobytes() for frame in frames] for i, frames in shots}


def test_a_window_of_one_shot_is_the_stock_model() -> None:
    """Coordinates computed by the stock pipeline, captions one after another with a stock 2-D mask."""
    model, window = tiny_video.transformer(), Window((17,), 64, 128, 8)
    tokens, sigma, states, words = inputs(window, 2)
    ids = LTXConditionPipeline._prepare_video_ids(1, 3, 2, 4)
    coordinates = LTXConditionPipeline._scale_video_ids(ids).float()
    coordinates[:, 0] /= 8
    with torch.no_grad():
        ours = window_velocity(model, tokens, sigma, states, words, window)
        stock = model(
            hidden_states=tokens,
            encoder_hidden_states=states.flatten(1, 2),
            timestep=sigma * 1000,
            encoder_attention_mask=words.flatten(1).float(),
            video_coords=coordinates,
            return_dict=False,
        )[0]
    assert torch.equal(ours, stock)


class IntraShot(LTXVideoAttnProcessor):
    """Self-attention inside shots only: then captions are the only way from shot to shot."""

    def __init__(self, shot: Tensor) -> None:
        super().__init__()
        self.mask = torch.where(shot[:, None] == shot, 0.0, -1e9)[None]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        mask = self.mask if encoder_hidden_states is None else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


@pytest.mark.parametrize("alone", [True, False])
def test_a_caption_reaches_its_own_shot_and_others_only_through_attention(alone: bool) -> None:
    model, window = tiny_video.transformer(), Window((9, 17, 9), 64, 64, 8)
    if alone:
        model.set_attn_processor(IntraShot(window.shot))
    tokens, sigma, states, words = inputs(window, 4)
    other = states.clone()
    other[:, 2] += 1  # the second shot's caption
    with torch.no_grad():
        change = window_velocity(model, tokens, sigma, states, words, window)
        change = change - window_velocity(model, tokens, sigma, other, words, window)
    moved = [part.abs().max().item() for part in change.split(window.sizes, dim=1)]
    assert moved[1] > 1e-4
    assert (moved[0] == moved[2] == 0) if alone else min(moved) > 1e-6


def test_the_global_caption_reaches_every_shot_and_padding_none() -> None:
    window = Window((9, 9), 64, 64, 8)
    words = torch.tensor([[[True, False], [True, False], [True, True]]])
    bias = window.caption_bias(words)[0]
    first, second = bias.split(window.sizes)
    assert (first == torch.tensor([0, -10_000, 0, -10_000, -10_000, -10_000])).all()
    assert (second == torch.tensor([0, -10_000, -10_000, -10_000, 0, 0])).all()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_shots_have_their_own_range_of_time(latents: list[int]) -> None:
    window = Window(tuple(8 * n + 1 for n in latents), 64, 96, 8)
    time = [part[0] for part in window.coordinates.split(window.sizes, dim=1)]
    assert all(a.max() < b.min() for a, b in pairwise(time))
    assert all(
        torch.isclose(part.max() - part.min(), torch.tensor(n - 0.875)) for part, n in zip(time, latents, strict=True)
    )
    assert window.first.sum() == 6 * len(latents) and len(window.shot) == window.coordinates.shape[1]


@pytest.mark.parametrize(("frames", "height"), [((), 64), ((8,), 64), ((9,), 48)])
def test_windows_that_latents_cannot_have(frames: tuple[int, ...], height: int) -> None:
    with pytest.raises(ValueError, match="frames"):
        Window(frames, height, 64, 8)


def test_first_frame_is_the_keyframe_as_the_vae_gives_it_back(animator: Animator) -> None:
    """Decoded alone or with the rest of its shot: the encoder and the decoder are causal."""
    keyframes = pictures()
    for index, frames in animator.animate(story(), keyframes):
        alone = decode_clips(animator.vae, encode_clips(animator.vae, to_tensor(keyframes[index])[:, :, None]), (2, 4))
        assert (alone[0, :, 0] - to_tensor(frames[0])[0]).abs().max() < 1.01 / 127.5 + (alone.abs().max() - 1).clamp(
            min=0
        )
        assert len(frames) == 9 and frames[0].size == (128, 64)


def test_the_autoencoder_is_causal_and_normalises() -> None:
    vae, g = tiny_video.vae(), torch.Generator().manual_seed(0)
    clip = torch.randn(1, 3, 17, 64, 64, generator=g)
    tokens = encode_clips(vae, clip)
    assert torch.allclose(tokens[:, :4], encode_clips(vae, clip[:, :, :1]), atol=1e-5)
    raw = vae.encode(clip).latent_dist.mode().flatten(2).transpose(1, 2)
    assert torch.allclose(tokens * vae.latents_std + vae.latents_mean, raw, atol=1e-5)
    assert torch.allclose(
        decode_clips(vae, tokens, (2, 2))[:, :, :1], decode_clips(vae, tokens[:, :4], (2, 2)), atol=1e-5
    )


def test_same_seed_same_film_and_shots_rendered_again_are_the_same(animator: Animator) -> None:
    keyframes = pictures()
    film = bytes_of(list(animator.animate(story(), keyframes, seed=3)))
    assert film == bytes_of(list(animator.animate(story(), keyframes, seed=3)))
    again = bytes_of(list(animator.animate(story(), keyframes, seed=3, drawn={0: list, 2: list})))
    assert again == {1: film[1]}
    assert all(film[i] != frames for i, frames in bytes_of(list(animator.animate(story(), keyframes, seed=4))).items())


def test_every_keyframe_conditions_every_shot_of_its_window(animator: Animator) -> None:
    keyframes = pictures()
    film = bytes_of(list(animator.animate(story(), keyframes)))
    other = bytes_of(list(animator.animate(story(), [keyframes[0], Image.new("RGB", (128, 64), "red"), keyframes[2]])))
    assert film[0] != other[0] and film[0][0] == other[0][0]  # another window-mate's keyframe; its own first frame
    assert film[2] == other[2]  # the next window


def test_guidance_one_is_none_and_two_is_more(folder: Path) -> None:
    films = []
    for guidance in (1.0, 2.0):
        animator = Animator.from_preset(tiny_video.preset(folder, folder, guidance=guidance))
        films.append(bytes_of(list(animator.animate(story(), pictures()))))
    assert films[0][0] != films[1][0] and films[0][0][0] == films[1][0][0]


def test_progress_counts_denoising_steps(animator: Animator) -> None:
    told: list[tuple[int, int, str]] = []
    list(animator.animate(story(), pictures(), on_progress=lambda *x: told.append(x)))
    assert [t[:2] for t in told] == [(1, 4), (2, 4), (3, 4), (4, 4)] and told[-1][2] == "shots 3 to 3 of 3"


@pytest.mark.parametrize(("seconds", "frames"), [(2.125, 17), (1.0, 9), (3.0, 25), (2.6, 17), (0.7, 9)])
def test_durations_become_frames(animator: Animator, seconds: float, frames: int) -> None:
    assert shot_frames(story(duration=seconds).shots[0], animator.settings) == frames
    assert shot_frames(story().shots[0], animator.settings) == animator.settings.frames


def test_the_global_caption_tells_the_looks_of_who_is_named() -> None:
    looks = {character.tag: character.description for character in story().cast}
    assert global_caption(looks, CAPTIONS[:2]) == "<ada>: red round, crown. <bo>: blue tall, bow."
    assert global_caption(looks, CAPTIONS[2:]) == ""


def test_bad_input_is_one_sentence(animator: Animator, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 keyframes for 3 shots"):
        list(animator.animate(story(), pictures(2)))
    with pytest.raises(UserError, match="aspect"):
        list(animator.animate(story(), [Image.new("RGB", (64, 64))] * 3))
    with pytest.raises(UserError, match="at least"):
        list(animator.animate(story(duration=0.2), pictures()))
    with pytest.raises(UserError, match=r"no LTX pipeline is there"):
        Animator.from_preset(tiny_video.preset(folder, tmp_path))
    with pytest.raises(UserError, match="multiples of 32"):
        Animator.from_preset(tiny_video.preset(folder, folder, height=60))


def test_a_caption_that_is_too_long_warns(animator: Animator) -> None:
    with pytest.warns(UserWarning, match="tokens and only 10 are read"):
        animator.encode_text(["wide shot, forest. " * 10])


def remembering(folder: Path, **changes: object) -> Animator:
    """Windows of one shot that see the other keyframes at full size, and keyframes without noise."""
    memory = {"window": 1, "memory_levels": 2, "memory_ratio": (1.0,), "keyframe_sigma": 0.0}
    return Animator.from_preset(tiny_video.preset(folder, folder, **memory | changes))


def test_the_stock_pipeline_makes_the_same_film(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shot, its keyframe, and the next shot's keyframe as a condition after its end: same seed, same frames."""
    animator, told = remembering(folder), story([CAPTIONS[0], CAPTIONS[2]], duration=2.125)
    keyframes, pipeline = pictures(2), LTXConditionPipeline.from_pretrained(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # the times below are shifted already
    pipeline.vae.encoder.conv_out.conv.bias.data[tiny_video.LATENT :] = -30.0  # it samples; ours takes the mode
    _, ours = next(animator.animate(told, keyframes, seed=3))
    captions = [global_caption({"<ada>": told.cast[0].description}, CAPTIONS[:1]), CAPTIONS[0]]
    states, words = animator.encode_text(captions)
    noise = torch.randn(1, 3 * 2 * 4, tiny_video.LATENT, generator=seeded(3, 0, "shot"))
    drawn = iter([rearrange(noise, "1 (f y x) c -> 1 c f y x", y=2, x=4), torch.zeros(1, tiny_video.LATENT, 1, 2, 4)])
    monkeypatch.setattr(pipeline_ltx_condition, "randn_tensor", lambda *shape, **where: next(drawn))
    stock = pipeline(
        conditions=[LTXVideoCondition(image=x, frame_index=i) for x, i in zip(keyframes, (0, 17), strict=True)],
        prompt_embeds=states.flatten(0, 1)[None],
        prompt_attention_mask=words.flatten()[None],
        timesteps=[1000 * sigma for sigma in schedule(2, animator.settings.shift)[:-1]],
        **{"height": 64, "width": 128, "num_frames": 17, "frame_rate": 8, "guidance_scale": 1.0},
        image_cond_noise_scale=0.0,
        output_type="np",
    ).frames[0]
    mine = torch.cat([to_tensor(frame) for frame in ours]) / 2 + 0.5
    assert (mine - torch.from_numpy(stock).permute(0, 3, 1, 2)).abs().max() < 0.5 / 255 + 1e-4  # ours are rounded


@pytest.mark.parametrize("shown", [0, 2])
def test_keyframes_outside_a_window_condition_it(folder: Path, shown: int) -> None:
    keyframes = pictures()
    other = [*keyframes]
    other[shown] = Image.new("RGB", (128, 64), "red")
    for levels, same in ((1, True), (2, False)):
        animator = remembering(folder, memory_levels=levels, memory_ratio=(1.0,) * (levels - 1))
        films = [bytes_of(list(animator.animate(story(), x)))[1] for x in (keyframes, other)]
        assert (films[0] == films[1]) is same


def test_what_is_remembered_goes_by_levels_and_lies_before_and_after(folder: Path) -> None:
    animator = remembering(folder, memory_levels=3, memory_group=1, memory_ratio=(1.0, 2.0))
    told, keyframes = story([*CAPTIONS, CAPTIONS[0]]), pictures(4)
    search = animator._search(told, keyframes)
    assert search(range(2, 3)) == [1, 3]  # both are near
    window, clean, given = animator._conditions(told, range(2, 3), keyframes, {}, search)
    assert (window.before, window.after, window.outside) == ((2,), (1,), 10)
    assert given.sum() == 10 + 8 and clean[:, ~given].abs().max() == 0
    time = window.coordinates[0]
    assert (time[:8] == -1).all() and (time[8:10] == 9 / 8).all() and time[10:].unique().tolist() == [0, 1 / 8]


def test_windows_overlap_and_go_on_from_what_is_drawn(folder: Path) -> None:
    animator = Animator.from_preset(tiny_video.preset(folder, folder, overlap=1))
    told, keyframes = story([*CAPTIONS, CAPTIONS[0]]), pictures(4)
    shots = dict(animator.animate(told, keyframes))
    assert list(shots) == [0, 1, 2, 3]
    rest = dict(animator.animate(told, keyframes, drawn={i: lambda i=i: shots[i] for i in (0, 1)}))
    assert {i: bytes_of([(i, x)])[i] for i, x in rest.items()} == {i: bytes_of([(i, shots[i])])[i] for i in (2, 3)}
    black = [Image.new("RGB", (128, 64))] * 9
    other = dict(animator.animate(told, keyframes, drawn={0: lambda: black, 1: lambda: black}))
    assert bytes_of([(2, other[2])]) != bytes_of([(2, shots[2])])


@pytest.mark.parametrize("overlap", [0, 1])
def test_another_take_has_other_noise_and_sees_whole_shots_only_where_windows_overlap(
    folder: Path, overlap: int
) -> None:
    """Weights that never met whole shots copy them into the take; their windows have no overlap."""
    animator, keyframes = Animator.from_preset(tiny_video.preset(folder, folder, overlap=overlap)), pictures()
    film, read = dict(animator.animate(story(), keyframes)), set[int]()

    def neighbour(colour: str) -> list[Image.Image]:
        read.add(1)
        return [Image.new("RGB", (128, 64), colour)] * 9

    takes = []
    for colour in ("black", "white"):
        rest = {1: lambda colour=colour: neighbour(colour), 2: lambda: film[2]}
        takes.append(bytes_of(list(animator.animate(story(), keyframes, drawn=rest, take=1))))
    assert list(takes[0]) == [0] and takes[0][0] != bytes_of([(0, film[0])])[0]
    assert (takes[0] != takes[1]) == bool(overlap) == bool(read)
    assert takes[0][0][0] == bytes_of([(0, film[0])])[0][0]  # the keyframe's
