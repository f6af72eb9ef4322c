import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cinema.ablation
from cinema.ablation import ABLATIONS, LEARNED, SHOTS, UNTOLD, ablate, learn_ratio
from cinema.cli import main
from cinema.config import TOY, Preset
from cinema.errors import UserError
from cinema.goldenmem import levels, tokens
from cinema.keyframes import KeyframePlanner
from cinema.progress import quiet
from cinema.training.config import TrainConfig
from cinema.training.keyframes import KeyframeTask

QUICK = replace(TOY, keyframes=replace(TOY.keyframes, steps=2, guidance=1.0))


def test_every_row_is_a_memory_that_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of all rows load and lay out the whole film, and within an ablation no two are equal."""
    monkeypatch.setattr(cinema.ablation, "learn_ratio", lambda preset: (1.6, 1.5, 1.5))
    for rows in ABLATIONS.values():
        plans = [{k: v for k, v in changes.items() if k not in ("trained", "untold")} for changes in rows.values()]
        chosen = [cinema.ablation._changed(TOY, changes).keyframes for changes in plans]
        assert len(set(map(str, rows.values()))) == len(rows) > 1
        for own in chosen:
            assert len(levels(8, own.memory_levels, own.memory_ratio)) == own.memory_levels
            assert own.mask in ("causal", "full") and own.window in (1, SHOTS)


def test_rows_are_judged_compared_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ABLATIONS, "levels", {name: {"memory_levels": int(name)} for name in ("4", "1")})
    told = ablate(QUICK, "levels", stories=2, seeds=(0, 1), out=tmp_path)
    assert list(told["rows"]) == ["4", "1"] and told["seeds"] == [0, 1]
    first, second = told["rows"].values()
    assert first["sides"] == [8, 5, 3, 2] and second["sides"] == [8]
    assert first["tokens"] == 3 * 128 + 4 * (50 + 18 + 8) and second["tokens"] == 3 * 128
    files = [json.loads((tmp_path / f"levels-1-{seed}.json").read_text())["result"] for seed in (0, 1)]
    for figure in ("identity", "psnr"):
        films = [np.concatenate(file[figure]) for file in files]
        assert second[figure]["by seed"] == [pytest.approx(np.mean(own)) for own in films]
        assert second[figure]["mean"] == pytest.approx(np.mean(np.concatenate(films)))
        assert first[figure]["gain ci95"] == [0, 0]
        low, high = second[figure]["ci95"]
        assert low <= second[figure]["mean"] <= high
    assert second["psnr"]["gain ci95"] != [0, 0] and len(list(tmp_path.glob("*.json"))) == 4
    with Image.open(tmp_path / "levels-4-0.png") as sheet:
        assert sheet.size == (2 * 256, 2 * 128)  # two films: what is real, and below it what was planned
    monkeypatch.setattr(KeyframePlanner, "plan", lambda *_: pytest.fail("a row was done twice"))
    assert ablate(QUICK, "levels", stories=2, seeds=(0, 1), out=tmp_path) == told
    monkeypatch.setitem(ABLATIONS, "group", {"4": {"memory_levels": 4}})  # the same memory by another name
    assert list(ablate(QUICK, "group", stories=2, seeds=(0, 1), out=tmp_path)["rows"].values()) == [first]
    assert (tmp_path / "group-4-1.png").read_bytes() == (tmp_path / "levels-4-1.png").read_bytes()
    with pytest.raises(pytest.fail.Exception, match="done twice"):  # of other settings nothing is kept
        ablate(replace(QUICK, keyframes=replace(QUICK.keyframes, steps=3)), "levels", 2, (0, 1), tmp_path)


def test_captions_tell_no_looks_where_they_are_untold(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, list[str]] = {}
    real = KeyframePlanner.plan

    def plan(self, story, seed, tell, known):
        heard[name] = [shot.caption for shot in story.shots]
        return real(self, story, seed, tell, known)

    monkeypatch.setattr(KeyframePlanner, "plan", plan)
    for name in ("looks told", "looks untold"):
        cinema.ablation._judge(QUICK, UNTOLD in ABLATIONS["words"][name], 1, 0, 1, quiet)
    told, untold = heard.values()
    assert sum(": " in line for line in told) > 3 and not any(": " in line for line in untold)
    assert [line.split(":")[0].split(".")[0] for line in told] == [line.split(".")[0] for line in untold]


def test_a_learned_ratio_costs_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, ...]] = []

    def error(preset: Preset, films: int, seed: int) -> float:
        asked.append(levels(8, 4, preset.keyframes.memory_ratio))
        return abs(asked[-1][1] - 4) + abs(asked[-1][3] - 4)  # smallest where the second and the last have side 4

    monkeypatch.setattr(cinema.ablation, "_error", error)
    four = replace(TOY, keyframes=replace(TOY.keyframes, memory_levels=4))
    best = levels(8, 4, learn_ratio.__wrapped__(four))
    room = sum(map(tokens, (8, 5, 3, 2)))
    assert (8, 5, 3, 2) in asked and len(set(asked)) == len(asked) > 3
    assert all(sum(map(tokens, sides)) <= room and sides == tuple(sorted(sides)[::-1]) for sides in asked)
    assert best == min(asked, key=lambda sides: abs(sides[1] - 4) + abs(sides[3] - 4))
    assert cinema.ablation._changed(four, {"memory_ratio": LEARNED}).keyframes.memory_ratio != LEARNED


def test_an_error_of_a_ratio_is_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next keyframe is told better by what is remembered than by noise in its place."""
    plain = replace(TOY, keyframes=replace(TOY.keyframes, guidance=1.0, memory_levels=4))
    blind = replace(plain, keyframes=replace(plain.keyframes, context_sigma=1.0))
    assert cinema.ablation._error(plain, 3, 0) < cinema.ablation._error(blind, 3, 0)


def test_weights_are_trained_on_with_another_mask_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cinema.ablation, "MOVIES", 2)
    monkeypatch.setattr(KeyframeTask, "sample", lambda *_: None)
    folders = [cinema.ablation._tuned(TOY, {"memory": {"mask": m}}, 1, 0, tmp_path, quiet) for m in ("causal", "full")]
    base, causal, full = (
        load_file(Path(f, "transformer", "diffusion_pytorch_model.safetensors"))
        for f in (TOY.keyframes.weights, *folders)
    )
    name = "single_transformer_blocks.6.attn.to_q.weight"
    assert not torch.equal(base[name], causal[name]) and not torch.equal(causal[name], full[name])
    monkeypatch.setattr(cinema.ablation, "run_training", lambda *_: pytest.fail("trained twice"))
    assert cinema.ablation._tuned(TOY, {"memory": {"mask": "full"}}, 1, 0, tmp_path, quiet) == folders[1]


def test_rows_of_training_differ_in_stages_and_start_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows take the same steps, each row's config is valid, and what starts from nothing says so."""
    seen: dict[str, TrainConfig] = {}
    monkeypatch.setattr(cinema.ablation, "make_task", lambda *_: None)
    monkeypatch.setattr(cinema.ablation, "run_training", lambda config, *_: seen.update({label: config}))
    for name in ("stages", "stride", "noise", "context"):
        for label, changes in ABLATIONS[name].items():
            cinema.ablation._tuned(TOY, changes["trained"], 40, 0, tmp_path, quiet)
            assert seen[label].total_steps == 40 and (seen[label].init is None) == (name == "stages")
    assert [s.pairs for s in seen["1, 4, 8, 12 pairs"].stages] == [1, 4, 8, 12]
    assert [s.steps for s in seen["1 for 75%, then 12"].stages] == [30, 10]
    assert seen["steps of 1 to 1"].options["stride"] == 1 and seen["one for all"].stages[0].shared_noise
    assert len({config.model_dump_json() for config in seen.values()}) == len(seen) == 14


def test_the_command_tells_identity_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    judged = {
        "pictures": torch.zeros(2, 3, 8, 16),
        "identity": [[True], [False]],
        "psnr": [[20.0], [22.0]],
        "sides": [8],
        "tokens": 384,
    }
    monkeypatch.setattr(cinema.ablation, "_judge", lambda *_: dict(judged))
    file = tmp_path / "f.json"
    assert main(["bench", "ablate", "rope", "--stories", "2", "--seeds", "1", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["rows"]["raw"]["identity"]["mean"] == 0.5
    assert "same extent" in capsys.readouterr().out


def test_an_unknown_ablation_is_one_sentence() -> None:
    with pytest.raises(UserError, match="there is no ablation 'x'; choose one of retrieval, ratio"):
        ablate(TOY, "x")
