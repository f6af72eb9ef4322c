"""Measurements of retrieval: how much of what matters is found, and how long a search takes."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from cinema.config import KeyframeSettings, Preset
from cinema.evaluation import interval
from cinema.keyframes import KeyframePlanner, TextEncoders, make_retriever
from cinema.progress import Progress, quiet
from cinema.retrieval import DEPTHS, RETRIEVALS, Index, Moment, coverage, describe, relevant
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_flashback


def bench_retrieval(
    preset: Preset, stories: int, seed: int = 0, frames: int = 300_000, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Coverage of the frames that matter, by who retrieves, over flashbacks of the toy world; and the time of a search.

    Asked for are all shots after the return of every story, at the depths of `retrieval.DEPTHS`; the frames are as the
    toy world draws them. Returns `coverage` (name -> k -> mean over stories and its 95 % interval) and `search`, of one
    query among so many random `frames` of width 512. UserError if the preset's weights or towers cannot be loaded.
    """
    text = KeyframePlanner.from_preset(preset).text
    found: dict[str, list[list[float]]] = {name: [] for name in RETRIEVALS}
    for i in range(stories):
        movie = sample_flashback(f"heldout/{seed}/{i}")
        for name, rows in _coverages(movie, preset.keyframes, text, i).items():
            found[name].append(np.mean(rows, axis=0).tolist())
        on_progress(i + 1, stories, f"story {i + 1} of {stories}")
    figures = {name: dict(zip(map(str, DEPTHS), _means(np.array(rows)), strict=True)) for name, rows in found.items()}
    return {"stories": stories, "seed": seed, "coverage": figures, "search": time_search(frames)}


def _coverages(movie: Movie, settings: KeyframeSettings, text: TextEncoders, seed: int) -> dict[str, list[list[float]]]:
    """Coverage at all depths of every shot of the last scene, by retriever."""
    story = movie.story()
    makers = {name: make_retriever(replace(settings, retrieval=name), text, "cpu", seed) for name in RETRIEVALS}
    rows: dict[str, list[list[float]]] = {name: [] for name in makers}
    for i, (setup, shot) in enumerate(zip(movie.shots, story.shots, strict=True)):
        query = Moment(shot, describe(story, shot.caption))
        if i >= len(movie.shots) - len(movie.shots) // 4:
            wanted = relevant(shot, story.shots[:i])
            for name, retriever in makers.items():
                ranked = retriever.rank(query, DEPTHS[-1])
                rows[name].append([coverage(ranked, wanted, k) for k in DEPTHS])
        for retriever in makers.values():
            retriever.add(replace(query, image=render(movie, setup, settings.height)))
    return rows


def _means(rows: Float[np.ndarray, "n k"]) -> list[dict[str, Any]]:
    """Mean of every column, and its 95 % interval by bootstrap over rows."""
    return [
        {"mean": float(column.mean()), "ci95": interval(column[:, None], lambda drawn: drawn[0] / len(rows))}
        for column in rows.T
    ]


def time_search(frames: int, width: int = 512, k: int = 16) -> dict[str, Any]:
    """Milliseconds of a search among random vectors and of the bare matrix product, the medians of interleaved runs."""
    index, generator = Index(width), torch.Generator().manual_seed(0)
    for start in range(0, frames, 20_000):
        index.add(torch.randn(min(20_000, frames - start), width, generator=generator))
    query = torch.randn(width, generator=generator)
    kept, half = index.vectors, query.half()
    runs: dict[str, Callable[[], object]] = {"search": lambda: index.search(query, k), "product": lambda: kept @ half}
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(11):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            took[name] += [time.perf_counter() - began] * (turn > 0)  # the first warms up
    spent = {f"{name} ms": 1e3 * float(np.median(times)) for name, times in took.items()}
    return {"frames": frames, **spent, "search / product": spent["search ms"] / spent["product ms"]}
