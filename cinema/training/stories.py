"""Toy stories as training data: drawn and encoded once, at every GoldenMem level, then read by position.

Axes: `n` movies, `m` shots of a movie, `s` tokens of a level, `c` channels of a token.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from jaxtyping import BFloat16, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cinema.errors import UserError
from cinema.files import atomic
from cinema.goldenmem import shrink
from cinema.keyframes import encode_frames
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_movie
from cinema.training.autoencoder import to_tensor

SHARD = 50  # movies per file


class StoryStore:
    """Latents of toy movies at several levels; shard files appear whole, so a killed run goes on where it was.

    Args:
        folder: where the shards are; each names the autoencoder and the levels that it belongs to, and the seed.
        vae: encodes the frames.
        movies, shots: how many movies there are, and shots in each.
        sides: short sides of the levels, in patches of 16 pixels; the first is the frame's own.
    """

    def __init__(
        self, folder: Path, vae: AutoencoderKL, seed: int, movies: int, shots: int, sides: tuple[int, ...]
    ) -> None:
        self.folder, self.vae, self.seed = folder, vae, seed
        self.movies, self.shots, self.sides = movies, shots, sides
        shards = [load_file(path) for path in self._shards()]
        self.latents: dict[int, BFloat16[Tensor, "n m s c"]] = {
            side: torch.cat([shard[str(side)] for shard in shards])[:movies] for side in sides
        }

    def movie(self, index: int) -> Movie:
        """The facts of a movie of the store."""
        return _movie(self.seed, index, self.shots)

    def window(self, index: int, shots: list[int]) -> tuple[list[str], dict[int, Tensor]]:
        """Some shots of a movie, told as a film of their own: captions, and latents "m s c" by level."""
        movie = self.movie(index)
        told = replace(movie, shots=[movie.shots[i] for i in shots])
        return told.captions(), {side: latents[index, shots] for side, latents in self.latents.items()}

    def _shards(self) -> Iterator[Path]:
        key = fingerprint(self.vae, self.sides)
        for start in range(0, self.movies, SHARD):
            path = self.folder / f"stories-{key}-{self.seed}-{self.shots}-{start:06d}.safetensors"
            if not path.exists():
                frames = [render(m, s) for i in range(start, start + SHARD) for m in [self.movie(i)] for s in m.shots]
                levels = {str(side): self._encode(to_tensor(frames), side) for side in self.sides}
                with atomic(path) as part:
                    save_file(levels, part)
            yield path

    def _encode(self, frames: Float[Tensor, "n 3 h w"], side: int) -> BFloat16[Tensor, "_movies _shots _s _c"]:
        small = frames if side == self.sides[0] else shrink(frames, side)
        tokens = torch.cat([encode_frames(self.vae, chunk) for chunk in small.split(32)])
        return rearrange(tokens, "(n m) s c -> n m s c", m=self.shots).to(torch.bfloat16).contiguous()


def fingerprint(encoder: nn.Module, *settings: object) -> str:
    """What tells encoders apart: a digest of a model's weights, and of anything else that latents depend on."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=8192)
def _movie(seed: int, index: int, shots: int) -> Movie:
    return sample_movie(f"train/{seed}/{index}", shots)


def sample_shots(rng: random.Random, available: int, count: int, stride: int = 3) -> list[int]:
    """Shots of one window: a random start, then random strides of 1 to `stride`, as far as the film allows.

    Raises:
        UserError: the film has fewer shots than the window.
    """
    if count > available:
        raise UserError(f"a stage of {count} pairs, but the films have {available} shots; lower pairs or raise shots")
    shots, room = [], available - count
    at = rng.randint(0, room)
    room -= at
    for _ in range(count):
        shots.append(at)
        step = rng.randint(1, min(stride, room + 1))
        room -= step - 1
        at += step
    return shots
