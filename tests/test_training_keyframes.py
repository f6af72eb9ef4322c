"""The keyframe model's training: what it is asked, what its loss sees, and that stock diffusers loads what it saves."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from cinema.config import TOY
from cinema.toyworld.world import sample_movie
from cinema.training import make_task
from cinema.training.config import Stage, TrainConfig
from cinema.training.keyframes import KeyframeTask, recall_error, recall_targets
from cinema.training.loop import HalfPrecision, run_training
from cinema.training.text import make_tokenizer, small_clip, small_t5

VAE = str(Path(TOY.keyframes.weights) / "vae")
SHAPE = {"double": 1, "single": 2, "heads": 2, "head_dim": 24, "text": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The package's autoencoder, and untrained text encoders."""
    folder = tmp_path_factory.mktemp("keyframes")
    torch.manual_seed(0)
    small_clip(width=32, layers=1, heads=2).save_pretrained(folder / "clip")
    small_t5(width=32, layers=1, heads=2).save_pretrained(folder / "t5")
    return {"vae": VAE, "clip": str(folder / "clip"), "t5": str(folder / "t5"), "cache": str(folder / "cache")}


@pytest.fixture(scope="module")
def task(folders: dict[str, str]) -> KeyframeTask:
    return KeyframeTask(0, None, **folders, movies=2, shots=6, recall=0.1, shape=SHAPE)


def test_words_are_asked_for_the_look_that_was_told_of_their_character() -> None:
    tokenizer = make_tokenizer(start=False)
    story = [
        "wide shot, forest. <ada> left, standing: red round, crown. <bo> right, waving: blue tall, bow. static.",
        "close shot, city. <bo> center, jumping. pan left.",
        "close shot, city. <cleo> center, jumping. pan left.",
    ]
    target, remembers = recall_targets(tokenizer, [story, ["", *story[1:]]])

    def asked(b: int, p: int) -> list[tuple[str, str]]:
        words, read = tokenizer.tokenize(story[p]), tokenizer.convert_ids_to_tokens
        return [
            (w, " ".join(sorted(read(row.nonzero()[:, 0].tolist()))))
            for w, row in zip(words, target[b, p], strict=False)
        ]

    red, blue = "crown red round", "blue bow tall"
    look = [(w, red) for w in ["<ada>", "left", "standing", "red", "round", "crown"]]
    look += [(w, blue) for w in ["<bo>", "right", "waving", "blue", "tall", "bow"]]
    nothing = [(w, "") for w in ["wide", "shot", "forest"]]
    assert asked(0, 0) == [*nothing, *look, ("static", "")]
    assert [x for x in asked(0, 1) if x[1]] == [("<bo>", blue), ("center", blue), ("jumping", blue)]
    assert not target[0, 2].any(), "nobody ever told how Cleo looks"
    assert not target[1].any(), "without the first caption nothing is known"
    assert remembers.nonzero().tolist() == [[0, 1, i] for i in (3, 4, 5)]


def test_the_error_of_recall_is_zero_for_the_right_words_and_counts_remembered_looks() -> None:
    tokenizer = make_tokenizer(start=False)
    target, remembers = recall_targets(tokenizer, [sample_movie("recall", 6).captions()])
    assert remembers.any()
    right = torch.where(target, 40.0, -40.0)
    error, exact = recall_error(right, target, remembers)
    assert error < 1e-6 and exact == 1.0
    wrong = torch.where(remembers[..., None], -right, right)
    error, exact = recall_error(wrong, target, remembers)
    assert error > 1 and exact == 0.0
    nothing = torch.zeros_like(target)
    assert recall_error(right, nothing, nothing.any(-1)) == (0.0, 1.0)


def test_loss_sees_each_pair_at_its_level_and_reaches_every_parameter(task: KeyframeTask) -> None:
    model = HalfPrecision(task.model)
    torch.nn.init.normal_(task.model.transformer.proj_out.weight, std=0.02)  # zero at the start: nothing behind learns
    for stage in (Stage(steps=1, batch=2, pairs=1), Stage(steps=1, batch=1, pairs=6, group=4)):
        loss, figures = task.loss(model, stage, 3)
        again, _ = task.loss(model, stage, 3)
        other, _ = task.loss(model, stage, 4)
        assert loss.isfinite() and loss == again and loss != other
        assert loss > 0.1 * figures["recall"]
    loss.backward()
    missing = [n for n, p in task.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_attention_learns_to_recall_a_look_by_its_name(task: KeyframeTask) -> None:
    """On two stories, a few steps at a time: the looks asked for become readable, those only remembered included."""
    torch.manual_seed(0)
    task.recall, stage, known = 1.0, Stage(steps=1, batch=2, pairs=4), []
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    for step in range(90):
        loss, figures = task.loss(task.model, stage, step % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        known.append(figures["known"])
    assert sum(known[:10]) < 2 and sum(known[-10:]) > 6, known


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
