"""Semantic retrieval: which earlier keyframes a new one should remember (paper, section 3.2).

A film comes back to a place or a person after an absence, so the newest frames are not the ones that matter. Who ranks
them: CLIP by a picture and the words for it, T5 by the words of both; recency, chance and an oracle to compare with.
Axes: `n` frames, `d` width of a vector.
"""

import random
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import open_clip
import torch
from jaxtyping import Float, Float16, Int
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from cinema.errors import UserError
from cinema.files import atomic
from cinema.story import TAG, Shot, Story

RETRIEVALS = ("clip", "t5", "recency", "random", "oracle")
DEPTHS = (1, 2, 4, 8, 16)  # k at which coverage is told
EXACT = 2.0**-8  # scores in half precision are less than half of this off: what is nearer to the best is read again


@dataclass(frozen=True)
class Moment:
    """A shot of a film as a retriever meets it; `text` describes it without names, and a query has no `image`."""

    shot: Shot
    text: str
    image: Image.Image | None = None


@runtime_checkable
class Retriever(Protocol):
    """Ranks what it was told of a film."""

    def add(self, moment: Moment) -> None:
        """Take in the next frame of the film."""

    def rank(self, query: Moment, k: int) -> list[int]:
        """The `k` frames that the query needs most, by their number, best first; all if there are fewer."""


def describe(story: Story, caption: str) -> str:
    """A caption with looks in the place of names, for towers that have never met the cast."""
    looks = {character.tag: character.description for character in story.cast}
    return re.sub(TAG, lambda found: looks.get(found[0]) or found[0].strip("<>"), caption)


def shared(a: Shot, b: Shot) -> int:
    """How many characters two shots share, and one more if they share the set."""
    return len({*a.tags} & {*b.tags}) + (a.set is not None and a.set == b.set)


def relevant(query: Shot, history: Sequence[Shot]) -> set[int]:
    """Shots of the history that share a character or the set with the query."""
    return {i for i, shot in enumerate(history) if shared(query, shot)}


def coverage(ranked: Sequence[int], wanted: Collection[int], k: int) -> float:
    """coverage@k: the share of the wanted frames, of which there must be some, that are among the first `k`."""
    return len({*ranked[:k]} & {*wanted}) / len(wanted)


class Index:
    """Unit vectors of frames, searched exactly: every query meets every vector.

    They are kept in half precision, which halves the time of a search; the few that may be among the best are compared
    again in single precision, so the result is that of a search in single precision over what is kept.
    """

    def __init__(self, width: int) -> None:
        self._room: Float16[Tensor, "room d"] = torch.empty(64, width, dtype=torch.float16)
        self._count = 0

    @property
    def vectors(self) -> Float16[Tensor, "n d"]:
        """What is kept, in order."""
        return self._room[: self._count]

    def add(self, vectors: Float[Tensor, "n d"]) -> None:
        """Append vectors, scaled to length 1."""
        while self._count + len(vectors) > len(self._room):
            self._room = torch.cat([self._room, torch.empty_like(self._room)])
        self._room[self._count : self._count + len(vectors)] = normalize(vectors.float(), dim=1)
        self._count += len(vectors)

    def search(self, query: Float[Tensor, "d"], k: int) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"]]:
        """Numbers and cosines of the `k` best, best first; all if there are fewer. ValueError if it is empty."""
        if not len(self.vectors):
            raise ValueError("the index is empty; add frames before searching")
        query = normalize(query.float(), dim=0)
        rough = self.vectors @ query.half()
        least = rough.topk(min(k, len(rough))).values[-1] - EXACT
        near = (rough >= least).nonzero()[:, 0]
        best = (self.vectors[near].float() @ query).topk(min(k, len(near)))
        return near[best.indices], best.values

    def save(self, path: Path) -> None:
        """Write it as safetensors; the file appears whole or not at all."""
        with atomic(path) as part:
            save_file({"vectors": self.vectors}, part)

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read what `save` wrote; UserError if that is something else."""
        try:
            index, index._room = cls(0), load_file(path)["vectors"]
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: not an index of frames ({error}); make it again") from None
        index._count = len(index._room)
        return index


class ClipRetriever:
    """Frames whose pictures are what the query's words describe, by open_clip's towers.

    `towers` is a folder with `open_clip_config.json`, or a name of open_clip's with its weights after a colon, such as
    "ViT-B-32:laion2b_s34b_b79k". UserError if they cannot be loaded.
    """

    def __init__(self, towers: str, device: str = "cpu") -> None:
        name, _, weights = (f"local-dir:{towers}", "", "") if Path(towers).is_dir() else towers.partition(":")
        try:
            model, _, self._see = open_clip.create_model_and_transforms(name, weights or None, device=device)
            self._read: Any = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{towers}: open_clip cannot load these towers ({why}); check the folder or name") from None
        self._model, self._device = model.eval().requires_grad_(False), device
        self.index = Index(self.words("a").shape[0])

    def add(self, moment: Moment) -> None:
        """Take in the next frame."""
        assert moment.image, "a query is no frame"
        self.index.add(self.pictures([moment.image]))

    def rank(self, query: Moment, k: int) -> list[int]:
        """See `Retriever`."""
        return self.index.search(self.words(query.text), k)[0].tolist()

    def pictures(self, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """Vectors of pictures."""
        seen: Any = [self._see(image.convert("RGB")) for image in images]
        return self._model.encode_image(torch.stack(seen).to(self._device)).float().cpu()

    def words(self, text: str) -> Float[Tensor, "d"]:
        """The vector of a description; what is beyond the tower's context is cut off, with a warning."""
        inner = getattr(self._read, "tokenizer", None)  # of a transformers tokenizer; open_clip's own adds two marks
        count = len(inner(text).input_ids) if inner else len(self._read.encode(text)) + 2
        if count > (most := self._read.context_length):
            told = f"a query has {count} tokens and the tower reads {most}, shorten it: {text[:60]!r}"
            warnings.warn(told, stacklevel=2)
        return self._model.encode_text(self._read([text]).to(self._device))[0].float().cpu()


class T5Retriever:
    """Frames whose captions read like the query's, by the mean of T5's states; `encode` gives those of a caption."""

    def __init__(self, encode: Callable[[str], Float[Tensor, "t d"]]) -> None:
        self._encode, self.index = encode, Index(encode("a").shape[1])

    def add(self, moment: Moment) -> None:
        """Take in the next frame."""
        self.index.add(self._encode(moment.shot.caption).float().mean(0, keepdim=True).cpu())

    def rank(self, query: Moment, k: int) -> list[int]:
        """See `Retriever`."""
        return self.index.search(self._encode(query.shot.caption).float().mean(0).cpu(), k)[0].tolist()


class Recency:
    """The newest frames, whatever they show."""

    def __init__(self) -> None:
        self.shots = list[Shot]()

    def add(self, moment: Moment) -> None:
        """Take in the next frame."""
        self.shots.append(moment.shot)

    def rank(self, query: Moment, k: int) -> list[int]:
        """See `Retriever`."""
        return [*range(len(self.shots) - 1, -1, -1)][:k]


class Random(Recency):
    """Frames by chance: what a rule must beat."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed

    def rank(self, query: Moment, k: int) -> list[int]:
        """See `Retriever`; the same number of frames gives the same choice."""
        rng = random.Random(f"{self._seed}/{len(self.shots)}")
        return rng.sample(range(len(self.shots)), min(k, len(self.shots)))


class Oracle(Recency):
    """Frames that share characters or the set, by how many of them; of equals the newest. What a rule may reach."""

    def rank(self, query: Moment, k: int) -> list[int]:
        """See `Retriever`."""
        newest_first = super().rank(query, len(self.shots))
        return sorted(newest_first, key=lambda i: shared(query.shot, self.shots[i]), reverse=True)[:k]
