"""Training: exact resume, checkpoints that survive a crash, configs that answer, one step of every toy task."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file

from cinema.errors import UserError
from cinema.keyframes import to_image
from cinema.training import make_task, train
from cinema.training.autoencoder import (
    AutoencoderTask,
    edge_error,
    frames_of_step,
    psnr,
    to_tensor,
    whiten,
)
from cinema.training.config import Stage, TrainConfig, load_config
from cinema.training.loop import At, HalfPrecision, latest_checkpoint, run_training, start_run
from cinema.training.stories import fingerprint
from cinema.training.text import (
    T5Task,
    clause_targets,
    make_tokenizer,
    shot_captions,
    tokenize,
    vocabulary,
)

TINY = {"height": 32, "shape": {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4}}


def settings(**changes: object) -> TrainConfig:
    told = {
        "task": "autoencoder",
        "options": TINY,
        "stages": [{"steps": 4, "batch": 1}, {"steps": 4, "batch": 2}],
        "muon_lr": 1e-3,
        "save_every": 3,
        "log_every": 2,
        "sample_every": 5,
        "warmup": 2,
    }
    return TrainConfig.model_validate(told | changes)


def tiny_task() -> AutoencoderTask:
    return AutoencoderTask(seed=0, init=None, **TINY)


class Stopping(AutoencoderTask):
    """Stops the run in the middle of a step, as a crash would."""

    def loss(self, model, stage, step):
        if step == 5:
            raise KeyboardInterrupt
        return super().loss(model, stage, step)


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    run_training(settings(), tiny_task(), tmp_path / "whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        run_training(settings(), Stopping(seed=0, init=None, **TINY), tmp_path / "cut", resume=False)
    assert latest_checkpoint(tmp_path / "cut").name == "checkpoint-0000003.safetensors"
    run_training(settings(), tiny_task(), tmp_path / "cut", resume=True)
    name = "checkpoint-0000008.safetensors"
    assert same(tmp_path / "whole" / name, tmp_path / "cut" / name)
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_kill_and_the_same_command_again(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(settings(stages=[{"steps": 30, "batch": 1}], save_every=5).model_dump(mode="json"))
    )
    command = [sys.executable, "-m", "cinema.cli", "train", str(config), "--resume", "-o"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "cut")], env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and latest_checkpoint(tmp_path / "cut") is None:
        time.sleep(0.01)  # polls for a state, proves nothing by its length
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], env=env, check=True, capture_output=True)
    assert same(*(tmp_path / d / "checkpoint-0000030.safetensors" for d in ("cut", "whole")))
    assert (tmp_path / "cut" / "weights" / "config.json").is_file()


def test_a_checkpoint_cut_in_half_is_passed_over(tmp_path: Path) -> None:
    run_training(settings(), tiny_task(), tmp_path, resume=False)
    newest = tmp_path / "checkpoint-0000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert latest_checkpoint(tmp_path).name == "checkpoint-0000006.safetensors"


def test_what_a_crash_left_is_cleared_away_and_the_good_checkpoint_stays(tmp_path: Path) -> None:
    run_training(settings(), tiny_task(), tmp_path, resume=False)
    whole = (tmp_path / "checkpoint-0000006.safetensors").read_bytes()
    damaged, part = tmp_path / "checkpoint-0000008.safetensors", tmp_path / ".checkpoint-0000008.part77.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    part.write_bytes(b"half")
    start_run(settings(keep=1), tiny_task(), tmp_path, resume=True)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-0000006.safetensors"]
    assert (tmp_path / "checkpoint-0000006.safetensors").read_bytes() == whole


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run_training(settings(), tiny_task(), tmp_path, resume=False)
    with pytest.raises(UserError, match="another config"):
        run_training(settings(lr=1e-5), tiny_task(), tmp_path, resume=True)
    with pytest.raises(UserError, match="--resume"):
        run_training(settings(), tiny_task(), tmp_path, resume=False)


def test_a_loss_that_is_not_a_number_names_the_step(tmp_path: Path) -> None:
    class Broken(AutoencoderTask):
        def loss(self, model, stage, step):
            loss, figures = super().loss(model, stage, step)
            return loss * (float("nan") if step == 4 else 1.0), figures

    with pytest.raises(UserError, match=r"step 4 is nan \(samples 4 to 5\).*checkpoint-0000003"):
        run_training(settings(), Broken(seed=0, init=None, **TINY), tmp_path, resume=False)


def test_a_loss_that_explodes_stops_the_run_before_its_step_is_taken(tmp_path: Path) -> None:
    class Exploding(AutoencoderTask):
        def loss(self, model, stage, step):
            loss, figures = super().loss(model, stage, step)
            return loss * (1e4 if step == 4 else 1.0), figures

    with pytest.raises(UserError, match=r"the loss at step 4 is \d"):
        run_training(settings(), Exploding(seed=0, init=None, **TINY), tmp_path, resume=False)
    assert latest_checkpoint(tmp_path).name == "checkpoint-0000003.safetensors"


def test_a_task_that_cannot_split_its_batches_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="AutoencoderTask trains in one process and without `accumulate`"):
        run_training(settings(accumulate=2, stages=[{"steps": 1, "batch": 2}]), tiny_task(), tmp_path, resume=False)


def test_the_place_in_the_data_counts_the_samples_of_every_stage() -> None:
    config = settings(stages=[{"steps": 3, "batch": 1}, {"steps": 2, "batch": 4}])
    assert [config.position(step) for step in range(6)] == [0, 1, 2, 3, 7, 11]
    at = At(3, 3, 4, part=1, parts=2)
    assert [*at.all] == [3, 4, 5, 6] and [*at.own] == [5, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1}, "learning_rate"),
        ({"stages": []}, "stages"),
        ({"stages": [{"steps": 0, "batch": 1}]}, "steps"),
        ({"lr": -1}, "lr"),
    ],
)
def test_config_errors_name_the_key(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"task": "autoencoder", "stages": [{"steps": 1, "batch": 1}]} | change))
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_missing_and_broken_configs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        train(tmp_path / "none.yaml", tmp_path / "run")
    (tmp_path / "x.yaml").write_text("task: [")
    with pytest.raises(UserError, match="not valid YAML"):
        train(tmp_path / "x.yaml", tmp_path / "run")
    with pytest.raises(UserError, match="no task 'x'"):
        make_task("x", 0, None, {})
    with pytest.raises(UserError, match="colour"):
        make_task("autoencoder", 0, None, {"colour": 1})
    for options in ({"height": "tall"}, {"seed": 3}, {"shape": {"colour": 1}}):
        with pytest.raises(UserError, match="correct the options"):
            make_task("autoencoder", 0, None, options)
    AutoencoderTask(seed=0, init=None, **TINY).save(tmp_path / "vae")
    with pytest.raises(UserError, match="'shape' is not an option where `init` gives the model"):
        make_task("autoencoder", 0, str(tmp_path / "vae"), TINY)


def test_every_shipped_config_is_valid() -> None:
    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert paths and all(load_config(p).total_steps > 0 for p in paths)


def test_rate_warms_up_holds_and_decays() -> None:
    config = settings(stages=[{"steps": 100, "batch": 1}], warmup=9, decay_from=0.5, final_lr=0.1)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(30) == 1.0
    assert config.rate(75) == pytest.approx(0.1 + 0.9 * 0.5)
    assert config.rate(100) == pytest.approx(0.1)


def test_stages_follow_each_other_each_with_its_rate() -> None:
    config = settings(stages=[{"steps": 3, "batch": 1}, {"steps": 2, "batch": 2, "lr": 0.5}], warmup=0, decay_from=0.9)
    assert [config.stage_at(step).batch for step in range(7)] == [1, 1, 1, 2, 2, 2, 2]
    assert [config.rate(step) for step in range(5)] == [1, 1, 1, 0.5, 0.5]


class Forgetful(AutoencoderTask):
    """Draws from the global generator, as dropout does."""

    def loss(self, model, stage, step):
        loss, figures = super().loss(model, stage, step)
        return loss * torch.rand(()), figures


def test_chance_within_a_model_is_of_the_step_alone(tmp_path: Path) -> None:
    run_training(settings(save_every=1, keep=9), Forgetful(seed=0, init=None, **TINY), tmp_path / "whole", resume=False)
    (tmp_path / "cut").mkdir()
    for name in ("config.json", "checkpoint-0000005.safetensors"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    run_training(settings(save_every=1, keep=9), Forgetful(seed=0, init=None, **TINY), tmp_path / "cut", resume=True)
    last = "checkpoint-0000008.safetensors"
    assert same(tmp_path / "whole" / last, tmp_path / "cut" / last)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(set(losses)) == len(losses)


def test_half_precision_gives_float32_gradients_near_the_full_ones() -> None:
    task = tiny_task()
    stage = Stage(steps=1, batch=2)
    full, _ = task.loss(task.model, stage, 0)
    full.backward()
    exact = {n: p.grad.clone() for n, p in task.model.named_parameters()}
    task.model.zero_grad()
    half, _ = task.loss(HalfPrecision(task.model), stage, 0)
    half.backward()
    grads = {n: p.grad for n, p in task.model.named_parameters()}
    assert all(g.dtype == torch.float32 for g in grads.values())
    assert half.item() == pytest.approx(full.item(), rel=0.05)  # bfloat16 keeps 8 bits
    a, b = (torch.cat([g[n].flatten() for n in exact]) for g in (exact, grads))
    assert torch.cosine_similarity(a, b, dim=0) > 0.97


def test_whitening_evens_the_latents_out_and_changes_no_picture(tmp_path: Path) -> None:
    task, frames = tiny_task(), frames_of_step(1, 0, 8, 32)
    plain, white = (AutoencoderKL.from_config(task.model.vae.config) for _ in range(2))
    for vae in (plain, white):
        vae.load_state_dict(task.model.vae.state_dict())
    whiten(white, frames)
    with torch.no_grad():
        latents = [vae.encode(frames).latent_dist.mode() for vae in (plain, white)]
        pictures = [vae.decode(x).sample for vae, x in zip((plain, white), latents, strict=True)]
    torch.testing.assert_close(pictures[1], pictures[0], rtol=0, atol=1e-3)  # the inverse of a matrix, in float32
    before, after = (torch.linalg.eigvalsh(torch.cov(rearrange(x, "n c y x -> c (n y x)"))) for x in latents)
    assert after.max() / after.median() < 1.01 < before.max() / before.median()


def test_a_saved_autoencoder_loads_white_and_scaled(tmp_path: Path) -> None:
    task = tiny_task()
    task.save(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float32)
    kept = [k for k in loaded.state_dict() if "encoder.conv_out" not in k and "decoder.conv_in.weight" not in k]
    own = task.model.vae.state_dict()
    for name in kept:
        torch.testing.assert_close(loaded.state_dict()[name], own[name], rtol=1e-2, atol=1e-2)  # saved as bfloat16
    with torch.no_grad():
        latents = loaded.encode(frames_of_step(0, 10**7, 64, 32)).latent_dist.mode()
    scaled = (latents - loaded.config.shift_factor) * loaded.config.scaling_factor
    assert scaled.mean().abs() < 0.02 and abs(scaled.std() - 1) < 0.02


def test_pictures_round_trip() -> None:
    frames = (torch.randint(0, 256, (1, 3, 8, 16)).float()) / 127.5 - 1
    assert torch.equal(to_tensor([to_image(frames)]), frames)
    assert psnr(frames, frames * 0.9) > 15 and edge_error(frames, frames + 0.1).item() == pytest.approx(0, abs=1e-6)


def test_every_word_of_a_clause_is_to_know_the_whole_clause() -> None:
    tokenizer = make_tokenizer(start=False)
    clauses = ["wide shot, forest.", "<ada> right, jumping: red round, crown.", "<bo> left, standing.", "pan left."]
    (target,) = clause_targets(tokenizer, [" ".join(clauses)])
    ids = tokenizer(" ".join(clauses)).input_ids
    place = 0
    for clause in clauses:
        words = set(tokenizer(clause, add_special_tokens=False).input_ids)
        for _ in words:
            assert set(target[place].nonzero()[:, 0].tolist()) == words and ids[place] in words
            place += 1
    assert not target[place:].any() and ids[place] == tokenizer.eos_token_id


def test_t5_is_scored_on_words_and_not_on_padding() -> None:
    task, captions = T5Task(0, None), shot_captions(0, 1, 4)
    loss, figures = task.loss(task.model, Stage(steps=2, batch=4), step=1)
    words, target = tokenize(task.tokenizer, captions), clause_targets(task.tokenizer, captions).float()
    error = torch.nn.functional.binary_cross_entropy_with_logits(task.model(words), target, reduction="none").sum(2)
    real = (words != task.tokenizer.pad_token_id) & (words != task.tokenizer.eos_token_id)
    torch.testing.assert_close(loss, error[real].mean())
    assert figures["exact"] == 0


def test_tokenizers_know_the_shot_list_and_spell_the_rest() -> None:
    t5, clip = make_tokenizer(start=False), make_tokenizer(start=True)
    line = "wide shot, forest. <ada> left, jumping: red round, crown. pan left."
    assert t5.decode(t5(line).input_ids[:-1]) == "wide shot forest <ada> left jumping red round crown pan left"
    assert len(clip(line).input_ids) == len(t5(line).input_ids) + 1
    assert t5.unk_token_id not in t5("A zeppelin over Oz").input_ids
    assert tokenize(t5, ["", line]).shape == (2, t5.model_max_length)
    assert len(set(vocabulary())) == len(vocabulary())


def test_a_missing_part_is_one_sentence(tmp_path: Path) -> None:
    options = {"vae": str(tmp_path / "vae"), "clip": str(tmp_path), "t5": str(tmp_path), "cache": "x"}
    with pytest.raises(UserError, match=r"keyframes: vae: path does not .*vae.*train that part first"):
        make_task("keyframes", 0, None, options)


def test_a_log_that_was_cut_in_half_does_not_stop_a_run(tmp_path: Path) -> None:
    run_training(settings(), tiny_task(), tmp_path / "run", resume=False)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "lo')
    (tmp_path / "run" / "config.json").write_text('{"task": "auto')
    assert run_training(settings(), tiny_task(), tmp_path / "run", resume=True).step == 8
    assert all(json.loads(line)["step"] <= 8 for line in log.read_text().splitlines())


def test_a_cache_belongs_to_its_encoder() -> None:
    one, other = (tiny_task().model.vae for _ in range(2))
    assert fingerprint([one], 8) == fingerprint([other], 8) != fingerprint([one], 5)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert fingerprint([one], 8) != fingerprint([other], 8)
