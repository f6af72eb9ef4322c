"""The keyframe model's training: what it is asked, what its loss sees, and that stock diffusers loads what it saves."""

import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from cinema import curation
from cinema.config import TOY
from cinema.errors import UserError
from cinema.goldenmem import shrink
from cinema.keyframes import encode_frames
from cinema.toyworld.film import write_film
from cinema.toyworld.world import sample_movie
from cinema.training import check_memory, make_task
from cinema.training.autoencoder import to_tensor
from cinema.training.config import Stage, TrainConfig
from cinema.training.keyframes import KeyframeTask, recall_error, recall_targets
from cinema.training.loop import At, HalfPrecision, run_training
from cinema.training.text import make_tokenizer

VAE = str(Path(TOY.keyframes.weights) / "vae")
SHAPE = {"double": 1, "single": 2, "heads": 2, "head_dim": 24, "text": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The package's autoencoder, and untrained text encoders."""
    folder = tmp_path_factory.mktemp("keyframes")
    return {"vae": VAE, "cache": str(folder / "cache")} | {k: str(path) for k, path in tiny.toy_text(folder).items()}


@pytest.fixture(scope="module")
def task(folders: dict[str, str]) -> KeyframeTask:
    return KeyframeTask(0, None, **folders, movies=2, shots=6, recall=0.1, shape=SHAPE)


def test_words_are_asked_for_the_look_that_can_be_known() -> None:
    tokenizer, cast = (
        make_tokenizer(start=False),
        {"<ada>": "red round, crown", "<bo>": "blue tall, bow", "<cleo>": "teal pear, cone"},
    )
    story = [
        "wide shot, forest. <ada> left, standing: red round, crown. <bo> right, waving: blue tall, bow. static.",
        "close shot, city. <bo> center, jumping. pan left.",
        "close shot, city. <cleo> center, jumping. pan left.",
        "close shot, city. <cleo> center, waving. pan left.",
    ]
    shown = torch.tensor([[False, False, True, False], [False, False, False, False]])
    target, remembers = recall_targets(tokenizer, [story, ["", *story[1:]]], [cast, cast], shown, 28)

    def asked(b: int, p: int) -> list[tuple[str, str]]:
        words, read = tokenizer.tokenize(story[p]), tokenizer.convert_ids_to_tokens
        return [
            (w, " ".join(sorted(read(row.nonzero()[:, 0].tolist()))))
            for w, row in zip(words, target[b, p], strict=False)
        ]

    red, blue, teal = "crown red round", "blue bow tall", "cone pear teal"
    look = [(w, red) for w in ["<ada>", "left", "standing", "red", "round", "crown"]]
    look += [(w, blue) for w in ["<bo>", "right", "waving", "blue", "tall", "bow"]]
    nothing = [(w, "") for w in ["wide", "shot", "forest"]]
    assert asked(0, 0) == [*nothing, *look, ("static", "")]
    assert [x for x in asked(0, 1) if x[1]] == [("<bo>", blue), ("center", blue), ("jumping", blue)]
    assert [x for x in asked(0, 2) if x[1]] == [(w, teal) for w in ("<cleo>", "center", "jumping")], "her picture shows"
    assert [x for x in asked(0, 3) if x[1]] == [(w, teal) for w in ("<cleo>", "center", "waving")], "and is remembered"
    assert not target[1].any(), "without the first caption, and with noise for pictures, nothing is known"
    assert remembers.nonzero().tolist() == [[0, p, i] for p in (1, 3) for i in (3, 4, 5)]


def test_the_error_of_recall_is_zero_for_the_right_words_and_counts_remembered_looks() -> None:
    tokenizer, movie = make_tokenizer(start=False), sample_movie("recall", 6)
    cast = {tag: str(look) for tag, look in movie.cast.items()}
    target, remembers = recall_targets(tokenizer, [movie.captions()], [cast], torch.zeros(1, 6, dtype=torch.bool), 28)
    assert remembers.any()
    right = torch.where(target, 40.0, -40.0)
    error, exact = recall_error(right, target, remembers)
    assert error < 1e-6 and exact == 1.0
    wrong = torch.where(remembers[..., None], -right, right)
    error, exact = recall_error(wrong, target, remembers)
    assert error > 1 and exact == 0.0
    nothing = torch.zeros_like(target)
    error, exact = recall_error(right, nothing, nothing.any(-1))
    assert error == 0 and math.isnan(exact)


def loss_of(task: KeyframeTask, model: torch.nn.Module, stage: Stage, at: At) -> torch.Tensor:
    return task.loss(model, stage, task.batch(stage, at))[0]


def test_loss_sees_each_pair_at_its_level_and_reaches_every_parameter(task: KeyframeTask) -> None:
    model = HalfPrecision(task.model)
    torch.nn.init.normal_(task.model.transformer.proj_out.weight, std=0.02)  # zero at the start: nothing behind learns
    torch.nn.init.normal_(task.model.recalls.weight, std=0.02)
    for stage in (Stage(steps=1, batch=2, pairs=1), Stage(steps=1, batch=1, pairs=6, group=4)):
        loss, figures = task.loss(model, stage, task.batch(stage, At(3, 3 * stage.batch, stage.batch)))
        again = loss_of(task, model, stage, At(3, 3 * stage.batch, stage.batch))
        other = loss_of(task, model, stage, At(4, 4 * stage.batch, stage.batch))
        assert loss.isfinite() and loss == again and loss != other
        assert loss > 0.1 * figures["recall"]
    assert {"sigma 0.00", "newest 0", "newest 3"} < {*figures}
    loss.backward()
    missing = [n for n, p in task.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_the_parts_of_a_batch_are_its_windows_and_their_mean_is_its_loss(task: KeyframeTask) -> None:
    stage = Stage(steps=1, batch=4, pairs=5, group=4)
    torch.nn.init.normal_(task.model.transformer.proj_out.weight, std=0.02)
    whole = task.batch(stage, At(7, 28, 4))
    parts = [task.batch(stage, At(7, 28, 4, part, 2)) for part in range(2)]
    assert torch.equal(torch.cat([part.target for part in parts]), whole.target)
    assert torch.equal(torch.cat([part.text for part in parts]), whole.text)
    losses = [task.loss(task.model, stage, part)[0].item() for part in parts]
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(task.loss(task.model, stage, whole)[0].item(), rel=1e-5)
    assert task.ids(stage, At(7, 28, 4)).count("film") == 4


def test_captions_tell_no_looks_in_the_share_of_windows_that_a_stage_asks_for(task: KeyframeTask) -> None:
    batch = [task.batch(Stage(steps=1, batch=2, pairs=2, untold=share), At(0, 0, 2)) for share in (0.0, 1.0)]
    window = task._windows(2)[0]
    assert not torch.equal(batch[0].text, batch[1].text) and torch.equal(batch[0].target, batch[1].target)
    told = [task._tell(window, random.Random(0), share) for share in (0.0, 1.0)]
    assert any(": " in line for line in told[0]) and not any(": " in line for line in told[1])


def test_the_cache_gives_what_the_encoders_give(task: KeyframeTask) -> None:
    """Latents at every level and the states of captions, as if they were encoded for this batch."""
    task_stage = Stage(steps=1, batch=3, pairs=6, group=4)
    batch = task.batch(task_stage, At(0, 0, 3))
    window = task._windows(6)[1]
    lines = task._tell(window, random.Random(f"{task.seed}/1"), 0.0)
    latents, states, pooled = task._read(window, lines, batch.layout)
    frames = to_tensor([task.films.frames(window.film, 128)[i] for i in window.shots])
    for (side, places), kept in zip(batch.layout.by_level(), latents, strict=True):
        small = frames[places] if side == 8 else shrink(frames[places], side)
        assert torch.equal(kept, encode_frames(task.planner.vae, small).bfloat16().float())
    assert torch.equal(states, torch.stack([task.text(line)[0] for line in lines]).bfloat16().float())
    assert torch.equal(batch.pooled[1], pooled)


def test_noise_is_of_each_pair_or_of_the_window_and_context_may_be_lost(folders: dict[str, str]) -> None:
    task = KeyframeTask(0, None, **folders, movies=2, shots=6, context_dropout=1.0, shape=SHAPE)
    own = task.batch(Stage(steps=1, batch=8, pairs=6, group=4), At(0, 0, 8))
    finest = own.layout.by_level()[0][1]
    learns = own.weight > 0
    assert (own.sigma[:, :2] == 1).all() and (own.sigma[:, finest][~learns] == 1).all() and learns[:, -1].all()
    assert own.sigma[:, finest][learns].unique().numel() == learns.sum()
    shared = task.batch(Stage(steps=1, batch=8, pairs=6, shared_noise=True), At(0, 0, 8))
    assert (shared.sigma == shared.sigma[:, :1]).all() and (shared.weight > 0).all()
    shuffled = KeyframeTask(0, None, **folders, movies=2, shots=6, shuffled=1.0, shape=SHAPE)
    stage = Stage(steps=1, batch=1, pairs=6, group=2)
    layouts = {shuffled.batch(stage, At(step, step, 1)).layout.sides for step in range(6)}
    assert len(layouts) > 2 and all(sides[-1] == 8 for sides in layouts)


def test_attention_learns_to_recall_a_look_by_its_name(folders: dict[str, str]) -> None:
    """On two stories, a few steps at a time: the looks asked for become readable, those only remembered included."""
    told = {"recall": 1.0, "context": 0.0, "context_sigma": 0.0}  # no picture is clean enough to be read
    task = KeyframeTask(0, None, **folders, movies=2, shots=6, **told, shape=SHAPE)
    stage, known = Stage(steps=1, batch=2, pairs=4), []
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    for step in range(200):
        loss, figures = task.loss(task.model, stage, task.batch(stage, At(step % 2, 2 * (step % 2), 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        known.append(figures["known"].nan_to_num(0))
    assert sum(known[:10]) < 2 and sum(known[-10:]) > 6, [round(float(x), 2) for x in known]


def test_a_run_saves_a_folder_that_stock_flux_draws_with(folders: dict[str, str], tmp_path: Path) -> None:
    told = {
        "task": "keyframes",
        "options": folders | {"movies": 2, "shots": 2, "shape": SHAPE},
        "stages": [{"steps": 1, "batch": 1, "pairs": 1}, {"steps": 1, "batch": 1, "pairs": 2}],
        "muon_lr": 1e-3,
    }
    config = TrainConfig.model_validate(told)
    run_training(config, make_task("keyframes", 0, None, config.options), tmp_path, resume=False)
    assert (tmp_path / "samples" / "final.png").exists()
    pipeline = FluxPipeline.from_pretrained(tmp_path / "weights", dtype=torch.bfloat16)
    assert pipeline("close shot, city.", height=32, width=64, num_inference_steps=1).images[0].size == (64, 32)


def config_of(folders: dict[str, str], **changes: object) -> TrainConfig:
    """Four steps of a window of three pairs, in batches of four."""
    options = {k: v for k, v in folders.items() if k == "cache"} | {"movies": 2, "shots": 6}
    stages = [{"steps": 4, "batch": 4, "pairs": 3}]
    told = {"task": "keyframes", "options": options, "stages": stages, "warmup": 0, "init": folders["base"]}
    told["options"] |= changes.pop("options", {})
    return TrainConfig.model_validate(told | {"save_every": 2, "log_every": 1, "sample_every": 99} | changes)


@pytest.fixture(scope="module")
def base(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A whole pipeline with few parameters as a folder, to start from."""
    folder, task = tmp_path_factory.mktemp("base"), KeyframeTask(0, None, **folders, movies=2, shots=6, shape=SHAPE)
    for name, parameter in task.model.named_parameters():
        if "norm" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    task.save(folder)
    return folders | {"base": str(folder)}


@pytest.fixture(autouse=True)
def _no_sheets(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "base" in request.fixturenames:
        monkeypatch.setattr(KeyframeTask, "sample", lambda *_: None)


def weights_after(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    run = run_training(config, make_task("keyframes", 0, config.init, config.options), folder, resume=False)
    return {name: value.detach().float() for name, value in run.task.model.state_dict().items()}


def test_passes_of_half_the_batch_add_up_to_one_step(base: dict[str, str], tmp_path: Path) -> None:
    whole = weights_after(config_of(base, precision="no"), tmp_path / "whole")
    halves = weights_after(config_of(base, precision="no", accumulate=2), tmp_path / "halves")
    start = weights_after(config_of(base, precision="no", lr=1e-12), tmp_path / "start")
    moved = max((whole[k] - start[k]).abs().max().item() for k in whole)
    apart = max((whole[k] - halves[k]).abs().max().item() for k in whole)
    assert moved > 1e-3 and apart < 0.02 * moved, (moved, apart)


def test_recompute_changes_nothing_but_memory(base: dict[str, str], tmp_path: Path) -> None:
    plain = weights_after(config_of(base), tmp_path / "plain")
    again = weights_after(config_of(base, options={"recompute": True}), tmp_path / "again")
    assert all(torch.equal(plain[k], again[k]) for k in plain)


def test_adapters_resume_exactly_and_stock_flux_loads_them(base: dict[str, str], tmp_path: Path) -> None:
    config = config_of(base, options={"lora": 4, "recall": 0.1}, lr=1e-2)
    own = weights_after(config, tmp_path / "run")
    first = load_file(sorted((tmp_path / "run").glob("checkpoint-*.safetensors"))[0])
    kept = {k.removeprefix("model.") for k in first if k.startswith("model.")}
    assert all("lora" in k or "recalls" in k for k in kept), "the frozen base is not written again"
    (tmp_path / "run" / "checkpoint-0000004.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "weights")
    task = make_task("keyframes", 0, config.init, config.options)
    resumed = run_training(config, task, tmp_path / "run", resume=True).task.model.state_dict()
    assert all(torch.equal(own[k], resumed[k].float()) for k in own)

    pipeline = FluxPipeline.from_pretrained(base["base"], dtype=torch.float32)
    draw = {"prompt": "close shot, city.", "height": 32, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    plain = pipeline(**draw, generator=torch.Generator().manual_seed(0)).images
    pipeline.load_lora_weights(tmp_path / "run" / "weights")
    adapted = {k: v for k, v in pipeline.transformer.state_dict().items() if "lora" in k}
    changed = pipeline(**draw, generator=torch.Generator().manual_seed(0)).images
    assert len(adapted) == sum("lora" in k for k in own) and abs(plain - changed).max() > 1e-3
    card = (tmp_path / "run" / "weights" / "README.md").read_text()
    assert (
        f"base_model: {Path(base['base']).name}\n" in card
        and base["base"] not in card
        and "adapters of rank 4" in card
        and "12 captioned shots of 2" in card
    )


def test_whole_weights_come_from_a_base_and_draw_in_stock_flux(base: dict[str, str], tmp_path: Path) -> None:
    weights_after(config_of(base), tmp_path / "run")
    again = make_task("keyframes", 0, str(tmp_path / "run" / "weights"), config_of(base).options)
    assert isinstance(again, KeyframeTask) and again.films.lengths == [6, 6]
    pipeline = FluxPipeline.from_pretrained(tmp_path / "run" / "weights", dtype=torch.bfloat16)
    assert pipeline("close shot, city.", height=32, width=64, num_inference_steps=1).images[0].size == (64, 32)


def test_moments_of_eight_bits_and_a_base_of_four_train_and_resume(base: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'cinema[quant]'")
    config = config_of(base, optimizer="adamw8bit", options={"lora": 8, "quantise": True})
    own = weights_after(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-0000004.safetensors").unlink()
    task = make_task("keyframes", 0, config.init, config.options)
    kinds = {type(layer).__name__ for layer in task.model.modules()}
    assert "Linear4bit" in kinds
    resumed = run_training(config, task, tmp_path / "run", resume=True).task.model.state_dict()
    assert all(torch.equal(own[k], resumed[k].float()) for k in own if "lora" in k)


def test_films_that_are_too_short_for_a_stage_are_counted(base: dict[str, str]) -> None:
    config = config_of(base)
    task = make_task("keyframes", 0, config.init, config.options)
    assert isinstance(task, KeyframeTask)
    vars(task)["films"] = SimpleNamespace(lengths=[6, 2])
    with pytest.warns(UserWarning, match="1 of 2 films have fewer than 4 shots and are left out"):
        task.check(Stage(steps=1, batch=1, pairs=4))


def test_what_cannot_be_trained_is_said_before_anything_is(base: dict[str, str], tmp_path: Path) -> None:
    def refused(words: str, **changes: object) -> None:
        config = config_of(base, **changes)
        with pytest.raises(UserError, match=words):
            check_memory(config)
            run_training(config, make_task("keyframes", 0, config.init, config.options), tmp_path / "x", resume=False)

    refused(
        r"stage 2: 7 pairs, but the longest film has 6 shots",
        stages=[{"steps": 1, "batch": 1}, {"steps": 1, "batch": 1, "pairs": 7}],
    )
    refused(r"stage 1: 6 pairs do not fit in 5 levels of 1", stages=[{"steps": 1, "batch": 1, "pairs": 6, "group": 1}])
    refused(
        r"stage 1: a batch of 3 cannot be split evenly among 1 processes and 2 passes",
        accumulate=2,
        stages=[{"steps": 1, "batch": 3}],
    )
    refused("input should be less than or equal to 1", options={"context": 2.0})
    refused("quantise freezes the base", options={"quantise": True})
    refused("no Flux pipeline is there", init=str(tmp_path))
    refused("unexpected keyword|no_such", options={"memory": {"no_such": 1}})
    huge = [{"steps": 1, "batch": 100_000, "pairs": 6}]
    refused(r"about [\d.]+ GiB of memory and [\d.]+ GiB are there; set options.recompute", stages=huge)


def test_a_damaged_cache_is_made_again(base: dict[str, str], tmp_path: Path) -> None:
    options = config_of(base).options | {"cache": str(tmp_path)}
    task = make_task("keyframes", 0, base["base"], options)
    (kept,) = tmp_path.iterdir()
    before = (kept / "000001.safetensors").read_bytes()
    (kept / "000001.safetensors").write_bytes(before[:1000])
    with pytest.raises(UserError, match=r"000001.safetensors: .*; run again, and it is made anew"):
        task.latents.read(1, "8")
    make_task("keyframes", 0, base["base"], options)
    assert (kept / "000001.safetensors").read_bytes() == before


def test_a_run_goes_on_only_on_the_same_films(base: dict[str, str], tmp_path: Path) -> None:
    for seed in range(2):
        write_film(sample_movie(seed, 5), tmp_path / f"film{seed}.mp4", height=128)
    films, out = curation.find_films([str(tmp_path)], str(tmp_path / "out")), str(tmp_path / "out")
    curation.curate(films, out, annotator=curation.GroundTruthAnnotator(), height=128)
    config = config_of(base, options={"data": out, "cache": str(tmp_path / "cache")})
    weights_after(config, tmp_path / "run")
    card = (tmp_path / "run" / "weights" / "README.md").read_text()
    assert "captioned shots of 2 films (out-" in card
    (tmp_path / "out" / "film1.done.json").unlink()
    task = make_task("keyframes", 0, config.init, config.options)
    with pytest.raises(UserError, match=r"the films have changed from out-.* since this run began"):
        run_training(config, task, tmp_path / "run", resume=True)
