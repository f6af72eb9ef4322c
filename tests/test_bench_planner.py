import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cinema.bench_planner import (
    HEAD,
    _draw,
    bench_planner,
    bench_train,
    bench_training,
    dense_pairs,
    most_allocated,
    random_flux,
    random_pairs,
)
from cinema.budget import Work, flops
from cinema.cli import main
from cinema.config import TOY
from cinema.goldenmem import Layout
from cinema.retrieval import RETRIEVALS
from cinema.training.keyframes import small_flux

CPU = torch.device("cpu")
SMALL = replace(TOY.keyframes, height=64, width=128, memory_levels=2, memory_group=2, steps=3)


def test_coverage_is_told_by_depth_and_rises_with_it(tmp_path: Path, capsys) -> None:
    file = tmp_path / "f.json"
    assert main(["bench", "retrieval", "--stories", "2", "--frames", "500", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert list(told["coverage"]) == list(RETRIEVALS) and told["search"]["frames"] == 500
    for by_depth in told["coverage"].values():
        means = [by_depth[k]["mean"] for k in ("1", "2", "4", "8", "16")]
        assert means == sorted(means) and means[0] >= 0 and means[-1] <= 1
    assert "coverage" in capsys.readouterr().out


def test_the_command_prints_seconds_and_ratios(tmp_path: Path, capsys) -> None:
    file = tmp_path / "f.json"
    given = ["--pairs", "1,3", "--width", "64", "--double", "1", "--single", "1", "--json", str(file)]
    assert main(["bench", "planner", *given]) == 0
    told = json.loads(file.read_text())
    assert set(told["seconds"]["naive"]) == set(told["naive / planned"]) == {"1", "3"}
    for count, ratio in told["naive / planned"].items():
        assert ratio == told["seconds"]["naive"][count] / told["seconds"]["planned"][count] > 0
    assert "planned, 3 / 1" in capsys.readouterr().out


def test_what_is_timed_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_flux(1, 1, 1, HEAD, HEAD).eval(), []

    def watched(name: str, what: str) -> None:
        real = getattr(model, name)

        def call(groups, *rest, **more):
            seen.append((what, [(group.latents.shape[1], group.index.tolist()) for group in groups]))
            return real(groups, *rest, **more)

        monkeypatch.setattr(model, name, call)

    watched("forward_pairs", "step")
    watched("encode_context", "context")
    _draw(model, SMALL, 9, naive=True)
    assert seen == [("step", [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [8])])] * 3
    seen.clear()
    _draw(model, SMALL, 9, naive=False)  # two levels of two, one of them the newest
    assert seen == [("context", [(1, [2]), (2, [0, 1])]), *[("step", [(1, [3])])] * 3]


def test_no_pairs_are_refused() -> None:
    for measure in (bench_planner, bench_training):
        with pytest.raises(ValueError, match="at least one pair, not 0"):
            measure(SMALL, (0,), (64, 1, 1))


def test_three_forms_are_timed_and_their_peaks_told() -> None:
    told = bench_training(SMALL, (1, 6), (64, 1, 1))
    forms = ("mask", "fold", "goldenmem")
    assert list(told["forms"]) == [f"{n} pairs, {form}" for n in (1, 6) for form in forms] and told["mask"] == "causal"
    mask, fold, golden = (told["forms"][f"6 pairs, {form}"] for form in forms)
    assert fold["mask / it"] == mask["seconds"] / fold["seconds"] and min(fold.values()) > 0
    assert 0 < golden["peak bytes"] < fold["peak bytes"] < mask["peak bytes"]
    assert json.loads(json.dumps(told)) == told


def test_the_command_prints_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.json"
    given = ["--pairs", "2", "--width", "64", "--double", "1", "--single", "1", "--json", str(file)]
    assert main(["bench", "training", *given]) == 0
    assert len(json.loads(file.read_text())["forms"]) == 3 and "mask / it" in capsys.readouterr().out


def test_the_dense_form_computes_what_the_folds_compute() -> None:
    model = random_flux((64, 1, 2)).float()
    for parameter in model.parameters():  # modulations and the output begin at zero
        torch.nn.init.normal_(parameter, std=0.1)
    groups = random_pairs(model, Layout(3, 4, 2, 2), 5)
    for causal in (False, True):
        folds = {
            int(k): out[:, j]
            for g, out in zip(groups, model.forward_pairs(groups, causal), strict=True)
            for j, k in enumerate(g.index)
        }
        for k, dense in enumerate(dense_pairs(model, groups, causal)):
            assert torch.allclose(dense, folds[k], atol=1e-5)


def test_the_most_allocated_is_of_the_run_alone() -> None:
    held = torch.zeros(1_000_000)
    assert most_allocated(lambda: (held + 1).sum(), CPU) in range(4_000_000, 4_100_000)
    assert most_allocated(lambda: None, CPU) == 0


def test_rates_follow_from_seconds_and_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    shape = ["--width", "64", "--double", "1", "--single", "1", "--pairs", "2,5", "--steps", "1", "--batch", "2"]
    assert main(["bench", "train", *shape, "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert list(told["rows"]) == ["2 pairs", "5 pairs"] and told["peak TFLOP/s"] > 0
    config = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64}
    config |= {"num_attention_heads": 1, "joint_attention_dim": 128, "pooled_projection_dim": 128}
    config |= {"guidance_embeds": False}
    for count, row in ((2, told["rows"]["2 pairs"]), (5, told["rows"]["5 pairs"])):
        sides = [5] * (count - 4) + [8] * min(count, 4)
        done = 2 * flops(config, sides, 28, Work("full", causal=True))
        assert row["TFLOP/s"] * row["seconds"] == pytest.approx(done / 1e12, rel=1e-6)
        assert row["pairs/s"] * row["seconds"] == pytest.approx(2 * count)
        assert row["of peak"] == pytest.approx(row["TFLOP/s"] / told["peak TFLOP/s"])
        assert 0 <= row["waiting for data"] < 1


def test_adapters_are_measured_as_adapters() -> None:
    told = bench_train(TOY, [2], shape=(64, 1, 1), steps=1, lora=2, recompute=True)
    assert told["lora"] == 2 and told["rows"]["2 pairs"]["seconds"] > 0
