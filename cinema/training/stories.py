"""Toy stories as training data: drawn and encoded once, then read by position; and trained pipelines as folders."""

import copy
import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from jaxtyping import BFloat16
from pydantic import DirectoryPath, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from cinema.errors import UserError
from cinema.files import atomic
from cinema.toyworld.world import Movie, sample_movie
from cinema.training.loop import Task


@dataclass(kw_only=True)
class StoryTask(Task):
    """A task on windows of toy stories, whose latents are encoded once."""

    vae: DirectoryPath  #: of the trained autoencoder, which stays as it is
    cache: Path  #: folder for the latents
    movies: PositiveInt = 400  #: in the training set
    shots: PositiveInt = 12  #: of each of them
    shift: PositiveFloat = 4.0  #: time shift of the training noise
    kind = "train"  # of toy movie: other kinds are other movies

    def movie(self, index: int) -> Movie:
        """A toy movie of the training set."""
        return sample_movie(f"{self.kind}/{self.seed}/{index}", self.shots)

    def encode(self, movie: Movie) -> dict[str, BFloat16[Tensor, "m _s c"]]:
        """Latents of a movie's shots, by what they are of."""
        raise NotImplementedError

    def latents(self, encoder: nn.Module, *settings: object) -> list[dict[str, BFloat16[Tensor, "m _s c"]]]:
        """What `encode` makes of every movie: made once and kept in a file each, so that a killed run goes on.

        Their folder's name tells the encoder and whatever else they depend on.
        """
        folder = self.cache / f"{self.kind}-{fingerprint(encoder, settings)}-{self.seed}-{self.shots}"
        paths = [folder / f"{index:06d}.safetensors" for index in range(self.movies)]
        for index, path in enumerate(paths):
            if not path.exists():
                with atomic(path) as part:
                    save_file(self.encode(self.movie(index)), part)
        return [load_file(path) for path in paths]


def fingerprint(encoder: nn.Module, *settings: object) -> str:
    """What tells encoders apart: a digest of a model's weights, and of anything else that latents depend on."""
    return hashlib.blake2b(repr(settings).encode() + save(encoder.state_dict()), digest_size=6).hexdigest()


def sample_shots(rng: random.Random, available: int, count: int, stride: int = 3) -> list[int]:
    """Shots of one window: a random start, then random strides of 1 to `stride`, as far as the film allows.

    UserError if the film has fewer shots than the window.
    """
    if count > available:
        raise UserError(f"a stage of {count} pairs, but the films have {available} shots; lower pairs or raise shots")
    shots, at = [], rng.randint(0, available - count)
    for left in reversed(range(count)):
        shots.append(at)
        at += rng.randint(1, min(stride, available - left - at)) if stride > 1 else 1
    return shots


def save_pipeline(kind: Any, folder: Path, shift: float, **parts: Any) -> None:
    """Write a folder that stock `kind.from_pretrained` loads, in bfloat16; the parts stay as they are."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    kind(scheduler=scheduler, **copy.deepcopy(parts)).to(torch.bfloat16).save_pretrained(folder)
