"""Interleaved data: windows of keyframe-text pairs out of films, with strides that change from epoch to epoch.

A film has few windows of neighbouring shots; with a stride of its own at every step it has very many, and each shows
other distances in time (dynamic stride sampling, paper, section 3.2). What a window is depends on the seed and its
position in the stream of all windows alone, not on how many processes read that stream.
"""

import hashlib
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from itertools import combinations
from pathlib import Path

import av
from PIL import Image, ImageOps

from cinema.curation.store import CuratedShot, read_done, read_film, read_rows
from cinema.errors import UserError
from cinema.toyworld.draw import render
from cinema.toyworld.film import draw_clip
from cinema.toyworld.world import Movie, sample_movie

TRIES = 20  # draws of a window before one is taken that shares too much: a film may have no other
ROOM = 4096  # films whose last window is remembered


@dataclass(frozen=True)
class ToyFilms:
    """Movies of the toy world, drawn when they are asked for; `kind` tells training films from others."""

    seed: int
    films: int
    shots: int
    kind: str = "train"

    @property
    def name(self) -> str:
        """Differs where the films do."""
        return f"{self.kind}-{self.seed}-{self.shots}"

    @property
    def lengths(self) -> Sequence[int]:
        """Shots of every film."""
        return [self.shots] * self.films

    def movie(self, film: int) -> Movie:
        """A movie, with all that the toy world knows about it."""
        return _movie(f"{self.kind}/{self.seed}/{film}", self.shots)

    def captions(self, film: int, shots: Sequence[int], described: bool = True) -> list[str]:
        """The shots told as a film of their own: looks at the first appearance among them, unless not `described`."""
        movie = self.movie(film)
        return replace(movie, shots=[movie.shots[i] for i in shots]).captions(() if described else movie.cast)

    def variants(self, film: int) -> list[str]:
        """Every caption that `captions` may give: every shot with each of its characters described or not."""
        movie = self.movie(film)
        lines = list[str]()
        for shot in movie.shots:
            alone, tags = replace(movie, shots=[shot]), [actor.tag for actor in shot.actors]
            for number in range(len(tags) + 1):
                lines += [alone.captions(known)[0] for known in combinations(tags, number)]
        return lines

    def looks(self, film: int) -> Mapping[str, str]:
        """What captions say of a character's look, by tag."""
        return {tag: str(look) for tag, look in self.movie(film).cast.items()}

    def frames(self, film: int, height: int) -> list[Image.Image]:
        """The keyframes of all shots, twice as wide as high."""
        movie = self.movie(film)
        return [render(movie, shot, height) for shot in movie.shots]

    def clips(self, film: int, height: int, frames: int, fps: int) -> Iterator[list[Image.Image]]:
        """The beginnings of all shots, so many frames each; here whole shots, whatever time they take."""
        movie = self.movie(film)
        for shot in movie.shots:
            yield draw_clip(movie, shot, height, frames)


_movie = lru_cache(maxsize=ROOM)(sample_movie)


class CuratedFilms:
    """What `cinema curate` left in a folder: kept shots that have a keyframe and a caption, of films that are done.

    With `seconds`, those that last as long at least. UserError if there are none.
    """

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self.seconds, self.paths, self.lines, digests = seconds, list[Path](), list[list[str]](), list[str]()
        for path in sorted(folder.glob("*.parquet")):
            done = read_done(path.with_suffix(".done.json"))
            if done and (lines := [shot.caption for shot in self._kept(read_film(path, images=False).shots)]):
                self.paths.append(path)
                self.lines.append(lines)
                digests.append(repr([path.stem, done, lines]))
        if not self.paths:
            rule = "curate films with an annotator first, `cinema curate FILM --annotator vision -o DIR`"
            raise UserError(f"{folder}: no curated film with captions is there; {rule}")
        self.lengths = [*map(len, self.lines)]
        self.name = f"{folder.name}-{hashlib.blake2b(repr(digests).encode(), digest_size=6).hexdigest()}"

    def _kept(self, shots: Iterable[CuratedShot]) -> list[CuratedShot]:
        long = (s for s in shots if s.end_s - s.start_s >= self.seconds)
        return [s for s in long if s.kept and s.caption and s.keyframe_s is not None]

    def captions(self, film: int, shots: Sequence[int], described: bool = True) -> list[str]:
        """As they are, whatever the window."""
        return [self.lines[film][i] for i in shots]

    def variants(self, film: int) -> list[str]:
        """The caption of every shot."""
        return self.lines[film]

    def looks(self, film: int) -> Mapping[str, str]:
        """None: nobody knows them word by word."""
        return {}

    def frames(self, film: int, height: int) -> list[Image.Image]:
        """As in `ToyFilms`."""
        pictures = (Image.open(BytesIO(s.image or b"")) for s in self._kept(read_rows(self.paths[film])))
        return [ImageOps.fit(picture.convert("RGB"), (2 * height, height)) for picture in pictures]

    def clips(self, film: int, height: int, frames: int, fps: int) -> Iterator[list[Image.Image]]:
        """As in `ToyFilms`, of the picture area, upright, with square pixels.

        UserError if videos are missing or bad.
        """
        path = self.paths[film]
        tar = path.parent / "clips" / f"{path.stem}.tar"
        if not tar.is_file():
            raise UserError(f"{tar}: there are no videos of shots; curate the film again with --video")
        try:
            with tarfile.open(tar, "r:") as videos:
                for shot in self._kept(read_film(path, images=False).shots):
                    area = shot.crop_left, shot.crop_top, shot.crop_right, shot.crop_bottom
                    taken = list[Image.Image]()
                    with av.open(videos.extractfile(f"{shot.shot:05}.mp4"), "r") as container:
                        for frame in container.decode(video=0):
                            while len(taken) < frames and len(taken) <= (frame.time or 0.0) * fps + 1e-3:
                                taken.append(ImageOps.fit(frame.to_image().crop(area), (2 * height, height)))
                    if len(taken) < frames:
                        what = f"shot {shot.shot} has {len(taken)} of {frames} frames at {fps} a second"
                        raise UserError(f"{path}: {what}; take this film out, or curate it again")
                    yield taken
        except (tarfile.TarError, KeyError, av.FFmpegError) as error:
            raise UserError(f"{tar}: damaged ({error}); delete it and curate the film again") from None


Films = ToyFilms | CuratedFilms


@dataclass(frozen=True)
class Window:
    """Shots of one film, in the order of time."""

    film: int
    shots: tuple[int, ...]

    def shared(self, other: "Window") -> float:
        """Share of this window's shots that another one of the film has, too."""
        return len({*self.shots} & {*other.shots}) / len(self.shots)


class Windows:
    """An endless stream of windows of so many `pairs`: every epoch gives one of every film, in an order of its own.

    From epoch to epoch a film's windows start elsewhere and step otherwise; one shares at most `max_shared` of its
    shots with the one before it, where the film is long enough for that. Films shorter than a window are left out;
    UserError if all of them are. A position gives the same window whoever asks, in whatever order.
    """

    def __init__(
        self, lengths: Sequence[int], pairs: int, seed: int = 0, stride: int = 3, max_shared: float = 0.75
    ) -> None:
        self.films = [film for film, shots in enumerate(lengths) if shots >= pairs]
        if not self.films:
            raise UserError(f"{pairs} pairs, but the longest film has {max(lengths, default=0)} shots")
        self.lengths, self.pairs, self.seed, self.stride, self.max_shared = lengths, pairs, seed, stride, max_shared
        self.last = dict[int, tuple[int, Window]]()  # film -> epoch, and its window: a memo
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def __getitem__(self, position: int) -> Window:
        """The window at a position of the stream, from 0."""
        epoch, place = divmod(position, len(self.films))
        return self._window(self._order(epoch)[place], epoch)

    def _shuffled(self, epoch: int) -> list[int]:
        return random.Random(f"{self.seed}/epoch {epoch}").sample(self.films, len(self.films))

    def _window(self, film: int, epoch: int) -> Window:
        done, window = self.last.get(film, (-1, None))
        if done > epoch:
            done, window = -1, None
        for now in range(done + 1, epoch + 1):
            before = window
            for turn in range(TRIES):
                rng = random.Random(f"{self.seed}/{film}/{now}/{turn}")
                window = Window(film, tuple(strided(rng, self.lengths[film], self.pairs, self.stride)))
                if before is None or window.shared(before) <= self.max_shared:
                    break
        assert window is not None
        self.last[film] = epoch, window
        return window


def strided(rng: random.Random, shots: int, pairs: int, stride: int = 3) -> list[int]:
    """So many of a film's shots, with steps of 1 to `stride` between them: every such window is as likely as any other.

    UserError if the film has fewer shots than the window.
    """
    if pairs > shots:
        raise UserError(f"{pairs} pairs, but the film has {shots} shots")
    ahead, window = _ahead(shots, pairs, stride), list[int]()
    for left in reversed(range(pairs)):
        places = range(window[-1] + 1, min(window[-1] + stride + 1, shots)) if window else range(shots)
        window += rng.choices(places, [ahead[left][place] for place in places])
    return window


def count_windows(shots: int, pairs: int, stride: int) -> int:
    """How many different windows a film has with steps of 1 to `stride`; `stride` 1 gives windows of neighbours."""
    return sum(_ahead(shots, pairs, stride)[-1])


@lru_cache(maxsize=64)
def _ahead(shots: int, pairs: int, stride: int) -> list[list[int]]:
    """For 0 to `pairs` - 1 more shots to come: in how many ways they can follow each shot."""
    ways = [[1] * shots]
    for _ in range(pairs - 1):
        ways.append([sum(ways[-1][at + 1 : at + stride + 1]) for at in range(shots)])
    return ways
