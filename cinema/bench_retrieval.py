"""Measurements of retrieval: how much of what matters is found, and how long a search takes."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from timeit import repeat
from typing import Any

import numpy as np
import torch

from cinema.config import Preset
from cinema.evaluation import bootstrap
from cinema.keyframes import KeyframePlanner, make_retriever
from cinema.progress import Progress, quiet
from cinema.retrieval import DEPTHS, RETRIEVALS, Index, Moment, coverage, describe, relevant
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_flashback


def bench_retrieval(
    preset: Preset, stories: int, seed: int = 0, frames: int = 300_000, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Coverage of the frames that matter, by who retrieves, over flashbacks of the toy world; and the time of a search.

    Asked for are all shots after the return of every story, at the depths of `retrieval.DEPTHS`; the frames are as the
    toy world draws them. Returns `coverage` (name -> k -> mean over stories and its 95 % interval) and `search`, of one
    query among so many random `frames` of width 512. UserError if the preset's weights or towers cannot be loaded.
    """
    text, settings = KeyframePlanner.from_preset(preset).text, preset.keyframes
    found: dict[str, list[Any]] = {name: [] for name in RETRIEVALS}
    for i in range(stories):
        movie = sample_flashback(f"heldout/{seed}/{i}")
        story, pictures = movie.story(), [render(movie, shot, settings.height) for shot in movie.shots]
        for name, rows in found.items():
            retriever, covered = make_retriever(replace(settings, retrieval=name), text.states, seed=i), []
            for j, shot in enumerate(story.shots):
                query = Moment(shot, describe(story, shot.caption))
                if j >= len(story.shots) * 3 // 4:  # after the return
                    ranked, wanted = retriever.rank(query, DEPTHS[-1]), relevant(shot, story.shots[:j])
                    covered.append([coverage(ranked, wanted, k) for k in DEPTHS])
                retriever.add(replace(query, image=pictures[j]))
            rows.append(np.mean(covered, axis=0))
        on_progress(i + 1, stories, f"story {i + 1} of {stories}")
    figures: dict[str, Any] = {name: {} for name in found}
    for name, rows in found.items():
        for k, column in zip(DEPTHS, np.transpose(rows).tolist(), strict=True):
            figures[name][str(k)] = {"mean": float(np.mean(column)), "ci95": bootstrap([[x] for x in column])}
    return {"stories": stories, "seed": seed, "coverage": figures, "search": time_search(frames)}


def time_search(frames: int, width: int = 512) -> dict[str, Any]:
    """Milliseconds of a search among random vectors and of the bare matrix product, medians of ten runs."""
    index, generator = Index(width), torch.Generator().manual_seed(0)
    for start in range(0, frames, 20_000):
        index.add(torch.randn(min(20_000, frames - start), width, generator=generator))
    query = torch.randn(width, generator=generator)
    kept, half = index.vectors, query.half()
    runs: dict[str, Callable[[], object]] = {"search": lambda: index.search(query, 16), "product": lambda: kept @ half}
    spent = {f"{name} ms": 1e3 * median(repeat(run, number=1, repeat=11)[1:]) for name, run in runs.items()}
    return {"frames": frames, **spent, "search / product": spent["search ms"] / spent["product ms"]}
