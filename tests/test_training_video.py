"""The video models' training: what their losses see, what they save, and that stock diffusers loads it."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_video
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from einops import rearrange
from PIL import Image

from cinema.curation import GroundTruthAnnotator, curate
from cinema.errors import UserError
from cinema.interleave import CuratedFilms
from cinema.toyworld.film import write_film
from cinema.toyworld.world import sample_movie
from cinema.training import make_task
from cinema.training import video as training_video
from cinema.training.autoencoder import VideoAutoencoderTask, clip_frames, clips_of_step, psnr, to_tensor
from cinema.training.config import Given, Stage, TrainConfig
from cinema.training.loop import At, HalfPrecision, run_training
from cinema.training.video import VideoTask
from cinema.video import Window, decode_clips, encode_clips

SHAPE = {"block_out_channels": [8, 8, 8], "decoder_block_out_channels": [8, 16], "decoder_layers_per_block": [0, 0, 1]}
SHAPE |= {"upsample_factor": [1, 2], "latent_channels": 8}
LTX = {"num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48, "num_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A video autoencoder and the text half of a Flux folder."""
    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    VideoAutoencoderTask(0, None, height=64, frames=9, shape=SHAPE).save(folder / "vae")
    tiny.text_encoders()[1].save_pretrained(folder / "flux" / "text_encoder_2")
    tiny.tokenizer(start=False, length=10).save_pretrained(folder / "flux" / "tokenizer_2")
    return {"vae": str(folder / "vae"), "keyframes": str(folder / "flux"), "cache": str(folder / "cache")}


@pytest.fixture(scope="module")
def task(folders: dict[str, str]) -> VideoTask:
    return VideoTask(0, None, **folders, movies=2, shots=3, shape=LTX)


def test_the_autoencoder_learns_clips_and_stills_and_saves_their_statistics(tmp_path: Path) -> None:
    task = make_task("video_autoencoder", 0, None, {"height": 64, "frames": 9, "stills": 1, "shape": SHAPE})
    stage, model = Stage(steps=2, batch=1), HalfPrecision(task.model)
    for step in range(2):
        loss, figures = task.loss(model, stage, step)
        assert loss.isfinite() and figures["psnr_first"] == (
            pytest.approx(figures["psnr"]) if step == 0 else figures["psnr_first"]
        )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())
    task.save(tmp_path / "vae")
    task.sample(tmp_path / "sheet.png", stage)
    vae = training_video.AutoencoderKLLTXVideo.from_pretrained(tmp_path / "vae")
    tokens = torch.cat([encode_clips(vae, clips_of_step(0, 10**7 + i, 4, 64, 9)) for i in range(8)])
    assert tokens.mean((0, 1)).abs().max() < 0.05 and (tokens.std((0, 1)) - 1).abs().max() < 0.05  # bf16 weights
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 128, 6 * 64)


def test_motion_and_the_first_frame_weigh_more() -> None:
    task = VideoAutoencoderTask(0, None, height=64, frames=9, first=4.0, motion=2.0, shape=SHAPE)
    clips = torch.zeros(1, 3, 3, 2, 2)
    clips[0, :, 2, 0, 0] = 1
    weight = task._weight(clips)
    assert weight[0, 0, :, 0, 0].tolist() == [5, 1, 3] and weight[0, 0, :, 1, 1].tolist() == [5, 1, 1]


def test_clips_and_lines_are_encoded_once_and_the_shards_are_kept(
    task: VideoTask, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    movie, settings, animator = task.films.movie(1), task.settings, task.animator
    clip = clip_frames(movie, movie.shots[2], settings.height, settings.frames)[None]
    own = encode_clips(animator.vae, clip)[0].to(torch.bfloat16)
    clips, states = task.latents.read(1, "clips", "states")
    assert torch.equal(clips[2], own) and psnr(decode_clips(animator.vae, own[None].float(), (8, 16)), clip) > 0
    line = task._places(1)[task.lines(1, range(1, 3))[0]]
    assert torch.equal(states[line], animator.encode_text(task.lines(1, range(1, 3))[:1])[0][0])
    monkeypatch.setattr(training_video, "encode_clips", lambda *_: pytest.fail("these clips are encoded already"))
    again = VideoTask(0, None, **folders, movies=1, shots=3, shape=LTX).latents
    assert torch.equal(again.read(0, "clips")[0], task.latents.read(0, "clips")[0])


def noise(task: VideoTask, window: Window, draws: int = 1, **given: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator, stage = torch.Generator().manual_seed(0), Stage(steps=1, batch=1, pairs=3, given=Given(**given))
    return tuple(
        torch.stack(x) for x in zip(*(task._noise(stage, window, generator) for _ in range(draws)), strict=True)
    )


def test_what_is_given_is_nearly_clean_and_does_not_learn(task: VideoTask) -> None:
    window = task.animator.window([task.settings.frames] * 3, before=(2,), after=(1,))
    sigma, learns = noise(task, window, 64, keyframes=0.9)
    given, outside = learns == 0, window.shot < 0
    assert given[:, outside].all() and not given[:, ~window.first & ~outside].any()
    assert sigma[given].max() <= task.keyframe_sigma
    assert abs(given[:, window.first].float().mean().item() - 0.9) < 0.08  # 192 draws
    shots = torch.stack([sigma[:, (window.shot == k) & ~window.first] for k in range(3)], dim=1)
    assert (shots == shots[:, :, :1]).all() and (shots[:, 0, 0] != shots[:, 1, 0]).all()  # one level a shot, its own


def test_windows_begin_with_whole_shots_but_never_have_all(task: VideoTask) -> None:
    window = task.animator.window([task.settings.frames] * 3)
    learns = noise(task, window, 200, keyframes=0.0, shots=1.0)[1]
    counts = torch.stack([(learns[:, window.shot == k] == 0).all(1) for k in range(3)], dim=1).sum(1)
    assert {*counts.tolist()} == {1, 2} and (learns[:, window.shot == 2] == 1).all()


def test_pictures_outside_are_of_other_shots_of_the_film_at_their_levels(
    task: VideoTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window sees keyframes of before and after it, in order, and tells what the animator tells."""
    settings = replace(task.settings, memory_levels=3, memory_group=1)
    monkeypatch.setattr(task, "settings", settings)
    monkeypatch.setattr(task.animator, "settings", settings)
    films = {str(rows): torch.arange(3.0)[:, None, None].expand(3, 2 * rows**2, 8) + 10 * rows for rows in (2, 3, 4, 5)}
    tokens = {"clips": torch.arange(3.0)[:, None, None].expand(3, task.animator.window([9]).sizes[0], 8)}
    names = {"states": torch.zeros(99, 28, tiny.TEXT), "words": torch.ones(99, 28, dtype=torch.bool)}
    known = films | tokens | names
    monkeypatch.setattr(task.latents, "read", lambda _film, *wanted: [known[name] for name in wanted])
    seen = set()
    for step in range(30):
        stage = Stage(steps=1, batch=1, pairs=1, given=Given(outside=1.0))
        before, window = task._layout(stage, random.Random(step))
        data, _, _ = task._read(stage, window, before, step)
        shot = int(data[-1, 0])
        told = [int(x) % 10 for x in data[: window.outside, 0].unique_consecutive()]
        assert told == sorted(told) and shot not in told and sum(i < shot for i in told) == before
        assert {int(x) // 10 for x in data[: window.outside, 0]} <= {*task.animator.levels}
        seen.add((len(window.before), len(window.after)))
    assert seen == {(1, 0), (0, 1), (1, 1), (2, 0), (0, 2)}


def test_the_loss_ignores_what_does_not_learn(task: VideoTask) -> None:
    """A model that is far off exactly where a clean frame is given has a small loss; parts make the whole."""
    stage = Stage(steps=1, batch=2, pairs=2)
    batch = task.batch(stage, At(0, 0, 2))

    class Wrong(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
            return 1e6 * (sigma <= task.keyframe_sigma)[..., None].expand_as(tokens)

    loss, _ = task.loss(Wrong(), stage, batch)
    assert loss.item() < 10 and (batch.weight == 0).any() and batch.weight.sum() == pytest.approx(1)
    parts = [task.loss(Wrong(), stage, task.batch(stage, At(0, 0, 2, part, 2)))[0] for part in range(2)]
    assert (sum(parts) / 2).item() == pytest.approx(loss.item(), rel=1e-5)


def test_lines_of_a_window_are_the_animators(task: VideoTask) -> None:
    story = task.films.movie(0).story()
    told = task.lines(0, range(1, 3))
    assert told[1:] == [shot.caption for shot in story.shots[1:3]]
    assert all(c.tag in told[0] and c.description in told[0] for c in story.cast if c.tag in told[1] + told[2])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
def test_it_trains_saves_and_stock_diffusers_draws(folders: dict[str, str], task: VideoTask, tmp_path: Path) -> None:
    options = {**folders, "movies": 2, "shots": 3, "shape": LTX}
    config = TrainConfig.model_validate(
        {
            "task": "video",
            "options": options,
            "muon_lr": 1e-3,
            "stages": [{"steps": 1, "batch": 2, "pairs": 1}, {"steps": 1, "batch": 1, "pairs": 3}],
        }
    )
    run = run_training(config, task, tmp_path / "run", resume=False)
    weights = tmp_path / "run" / "weights"
    pipeline = LTXConditionPipeline.from_pretrained(weights, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    average = run.ema["transformer.proj_out.weight"]
    assert torch.equal(pipeline.transformer.proj_out.weight, average.to(torch.bfloat16)) and average.abs().max() > 0
    condition = LTXVideoCondition(image=Image.new("RGB", (128, 64), "red"), frame_index=0)
    video = pipeline(
        conditions=[condition],
        prompt="wide shot, forest.",
        height=64,
        width=128,
        num_frames=9,
        frame_rate=8,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=10,
        output_type="pt",
    ).frames
    assert video.shape == (1, 9, 3, 64, 128) and video.isfinite().all()
    assert (tmp_path / "run" / "samples" / "final.png").is_file()


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film, shot and curated as a film from outside, with the videos of its shots."""
    folder = tmp_path_factory.mktemp("curated")
    write_film(sample_movie("film", 4), folder / "film.mp4", letterbox=16)
    curate([folder / "film.mp4"], folder / "out", annotator=GroundTruthAnnotator(), video=True, workers=1)
    return folder / "out"


def test_clips_of_curated_films_are_their_shots_without_bars(curated: Path) -> None:
    movie, films = sample_movie("film", 4), CuratedFilms(curated, 17 / 8)
    assert films.lengths == [4] and CuratedFilms(curated, 0.1).lengths == [4]
    for shot, frames in zip(movie.shots, films.clips(0, 128, 17, 8), strict=True):
        drawn = clip_frames(movie, shot, 128, 17)
        assert psnr(rearrange(to_tensor(frames), "t c h w -> c t h w")[None], drawn[None]) > 30
    slow = next(films.clips(0, 64, 5, 4))
    assert [frame.size for frame in slow] == [(128, 64)] * 5
    with pytest.raises(UserError, match="17 of 25 frames at 8 a second"):
        next(films.clips(0, 128, 25, 8))
    tar = curated / "clips" / "film.tar"
    whole = tar.read_bytes()
    try:
        for bad in (whole[: len(whole) // 2], b"junk" * 500, whole.replace(b"moov", b"woov")):
            tar.write_bytes(bad)
            with pytest.raises(UserError, match=r"film.tar: damaged .*; delete it and curate the film again"):
                list(films.clips(0, 128, 17, 8))
        tar.unlink()
        with pytest.raises(UserError, match="curate the film again with --video"):
            next(films.clips(0, 128, 17, 8))
    finally:
        tar.write_bytes(whole)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"pairs": 4}, "4 shots, but a window has 4 at most and the longest film 3"),
        ({"pairs": 1, "given": {"outside": 0.5}}, "set options.memory.memory_levels to 2 or more"),
        ({"pairs": 1, "untold": 0.5}, "untold is of keyframe models"),
    ],
)
def test_stages_that_cannot_be_are_refused(task: VideoTask, stage: dict, said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        task.check(Stage(steps=1, batch=1, **stage))


def test_adapters_of_a_base_learn_from_curated_films_and_stock_ltx_loads_them(curated: Path, tmp_path: Path) -> None:
    base = tiny_video.pipeline_folder(tmp_path / "base")
    options = {"data": str(curated), "cache": str(tmp_path / "cache"), "lora": 4, "recompute": True}
    given = {"keyframes": 0.9, "shots": 0.5}
    stages = [{"steps": 2, "batch": 2, "pairs": 2, "given": given}]
    config = TrainConfig.model_validate(
        {"task": "video", "init": str(base), "options": options, "stages": stages, "accumulate": 2, "sample_every": 0}
    )
    run = run_training(config, make_task("video", 0, str(base), options), tmp_path / "run", resume=False)
    assert run.log[-1]["loss"] > 0 and all("lora" in name for name in run.ema)
    pipeline = LTXConditionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "run" / "weights")
    theirs = {k: v for k, v in pipeline.transformer.state_dict().items() if "lora" in k}
    assert len(theirs) == len(run.ema) and any(v.abs().max() > 0 for k, v in theirs.items() if "lora_B" in k)
