"""The measurement of training takes the loop's own steps, and its figures hang together."""

import json
from pathlib import Path

import pytest

from cinema.bench_train import bench_train, matmul_peak
from cinema.budget import Work, flops, linears
from cinema.cli import main
from cinema.config import TOY
from cinema.errors import UserError


def test_rates_follow_from_seconds_and_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    shape = ["--width", "64", "--double", "1", "--single", "1", "--pairs", "2,5", "--steps", "1", "--batch", "2"]
    assert main(["bench", "train", *shape, "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert list(told["rows"]) == ["2 pairs", "5 pairs"] and told["peak TFLOP/s"] > 0
    config = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64}
    config |= {"num_attention_heads": 1, "joint_attention_dim": 128, "pooled_projection_dim": 128}
    config |= {"guidance_embeds": False}
    assert linears(config)
    for count, row in ((2, told["rows"]["2 pairs"]), (5, told["rows"]["5 pairs"])):
        sides = [5] * (count - 4) + [8] * min(count, 4)
        done = 2 * flops(config, sides, 28, Work("full", causal=True))
        assert row["TFLOP/s"] * row["seconds"] == pytest.approx(done / 1e12, rel=1e-6)
        assert row["pairs/s"] * row["seconds"] == pytest.approx(2 * count)
        assert row["of peak"] == pytest.approx(row["TFLOP/s"] / told["peak TFLOP/s"])
        assert 0 <= row["waiting for data"] < 1


def test_adapters_are_measured_as_adapters() -> None:
    told = bench_train(TOY, [2], width=64, double=1, single=1, steps=1, lora=2, recompute=True)
    assert told["lora"] == 2 and told["rows"]["2 pairs"]["seconds"] > 0
    assert matmul_peak(64, 1) > 0


def test_a_shape_that_cannot_be_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"a width of 65 and .2. pairs: give a multiple of 64"):
        bench_train(TOY, [2], width=65)
