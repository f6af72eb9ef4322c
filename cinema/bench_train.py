"""What a step of training costs as it is done: the loop's own steps, batches and optimisers on a random transformer."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cinema.bench_planner import HEAD, check_shape, seconds_of
from cinema.budget import Work, flops
from cinema.config import TOY, Preset
from cinema.progress import Progress, quiet
from cinema.training.config import TrainConfig
from cinema.training.keyframes import PARTS, KeyframeTask
from cinema.training.loop import batches_of, one_step, start_run

WARM = 2  # steps before the clock starts
FILMS = 2


def bench_train(
    preset: Preset,
    pairs: Sequence[int] = (8,),
    width: int = 768,
    double: int = 4,
    single: int = 8,
    steps: int = 5,
    batch: int = 1,
    lora: int | None = None,
    recompute: bool = False,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Time, rate and memory of optimiser steps on windows of so many pairs, toy films at the preset's size and memory.

    Gives, by pairs: median `seconds` of a step, `pairs/s`, model `TFLOP/s` (what is computed again is not counted),
    their share of `peak TFLOP/s`, which a large bfloat16 matrix product reaches here, the share of time spent waiting
    for a batch, and on a GPU the peak bytes. UserError for a shape or a number of pairs that cannot be.
    """
    check_shape(width, pairs)
    peak, rows = matmul_peak(), dict[str, Any]()
    with TemporaryDirectory() as spare:
        for i, count in enumerate(pairs):
            on_progress(i, len(pairs), f"{count} pairs")
            group = max(preset.keyframes.memory_group, -(-count // preset.keyframes.memory_levels))
            stage = {"steps": WARM + steps, "batch": batch, "pairs": count, "group": group}
            shape = {"double": double, "single": single, "heads": width // HEAD, "head_dim": HEAD}
            parts: dict[str, Any] = {part: Path(TOY.keyframes.weights) / where for part, where in PARTS.items()}
            task = KeyframeTask(
                0, None, **parts, cache=Path(spare), movies=FILMS, shots=max(pairs), preset=preset.name, shape=shape,
                lora=lora, recompute=recompute,
            )  # fmt: skip
            config = TrainConfig.model_validate({"task": "keyframes", "stages": [stage], "muon_lr": None})
            rows[f"{count} pairs"] = _measure(task, config, Path(spare) / str(count), peak, lora)
    facts = {"width": width, "double": double, "single": single, "batch": batch, "lora": lora, "recompute": recompute}
    return facts | {"preset": preset.name, "peak TFLOP/s": peak, "rows": rows}


def _measure(task: KeyframeTask, config: TrainConfig, out: Path, peak: float, lora: int | None) -> dict[str, float]:
    run, stage = start_run(config, task, out, resume=False), config.stages[0]
    waits, spent = list[float](), list[float]()
    with batches_of(run) as coming:
        for step in range(config.total_steps):
            if step == WARM and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            batch = next(coming)
            waits.append(time.perf_counter() - began)
            spent.append(waits[-1] + seconds_of(partial(one_step, run, stage, batch)))
            run.step += 1
    seconds, settings = float(np.median(spent[WARM:])), task.settings
    work = Work("lora" if lora else "full", causal=settings.mask == "causal", rank=lora or 1)
    sides = task.layout(stage, 0).sides
    rate = stage.batch * flops(task.planner.transformer.config, sides, settings.text_tokens, work) / seconds / 1e12
    row = {"seconds": seconds, "pairs/s": stage.batch * stage.pairs / seconds, "TFLOP/s": rate, "of peak": rate / peak}
    row["waiting for data"] = sum(waits[WARM:]) / sum(spent[WARM:])
    return row | ({"peak bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def matmul_peak(size: int = 4096, turns: int = 5) -> float:
    """TFLOP/s of the fastest of some bfloat16 products of square matrices, smaller ones on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size if device == "cuda" else size // 2
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(turns)) / 1e12
