"""Toy stories as training data: drawn and encoded once, then read by position; and trained pipelines as folders."""

import copy
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cinema.errors import UserError
from cinema.files import atomic


def load_shards(stem: Path, movies: int, size: int, encode: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of toy movies, along their first axis, from files of `size` movies each.

    A file that is missing is made first, by `encode` from its movies' numbers, and appears whole: a killed run goes on
    where it was. `stem` is how the files' paths begin; it names all that the tensors depend on.
    """
    shards = []
    for start in range(0, movies, size):
        path = stem.with_name(f"{stem.name}-{start:06d}.safetensors")
        if not path.exists():
            with atomic(path) as part:
                save_file(encode(range(start, start + size)), part)
        shards.append(load_file(path))
    return {name: torch.cat([shard[name] for shard in shards])[:movies] for name in shards[0]}


def fingerprint(encoder: nn.Module, *settings: object) -> str:
    """What tells encoders apart: a digest of a model's weights, and of anything else that latents depend on."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def sample_shots(rng: random.Random, available: int, count: int, stride: int = 3) -> list[int]:
    """Shots of one window: a random start, then random strides of 1 to `stride`, as far as the film allows.

    Raises:
        UserError: the film has fewer shots than the window.
    """
    if count > available:
        raise UserError(f"a stage of {count} pairs, but the films have {available} shots; lower pairs or raise shots")
    shots, at = [], rng.randint(0, available - count)
    for left in reversed(range(count)):
        shots.append(at)
        at += rng.randint(1, min(stride, available - left - at))
    return shots


def save_pipeline(kind: Any, folder: Path, shift: float, **parts: Any) -> None:
    """Write a folder that stock `kind.from_pretrained` loads, in bfloat16; the parts stay as they are."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    kind(scheduler=scheduler, **copy.deepcopy(parts)).to(torch.bfloat16).save_pretrained(folder)
