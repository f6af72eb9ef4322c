"""Scores of any film or storyboard that has its story beside it: learned measures, and exact ones of toy films.

A measure of a shot takes the shot as `Shown` and gives a number, or None where it does not apply. Of a film it takes
the first picture of every shot. Axes: `n` pictures, `d` width of a vector.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from cinema.bench import Event
from cinema.bench import judge as judge_cuts
from cinema.chat import endpoint_from_environment
from cinema.config import Preset
from cinema.curation.film import Timeline, probe
from cinema.curation.frames import find_borders
from cinema.curation.report import thumb, write_page
from cinema.curation.shots import DETECTOR, cut_film
from cinema.errors import UserError
from cinema.evaluation.film import LOOK, Film, diversity, read_film
from cinema.evaluation.judge import judge_film, true_judge
from cinema.evaluation.stories import bootstrap, share
from cinema.evaluation.toy import psnr, score_clip, score_keyframes
from cinema.files import write_json
from cinema.media import film_writer
from cinema.movie import weights_identity
from cinema.progress import Progress, quiet
from cinema.retrieval import ClipRetriever, describe
from cinema.story import Story

SAME = 0.4  # cosine from which two pictures show the same character (VBench-2.0, human identity)
MOVES = 0.006  # of the frame's height: a pixel that moves so far from frame to frame moves
FASTEST = 0.05  # share of pixels, the fastest, that dynamic degree looks at (VBench)

Embed = Callable[[Sequence[Image.Image]], Float[Tensor, "n d"]]


@dataclass(frozen=True)
class Shown:
    """A shot as it is scored."""

    caption: str
    text: str  #: the caption with looks in the place of names
    frames: list[Image.Image]
    keyframe: Image.Image | None
    towers: ClipRetriever
    embed: Embed  #: what tells subjects apart

    @cached_property
    def pixels(self) -> UInt8[np.ndarray, "n h w 3"]:
        """All frames, small."""
        return np.stack([np.asarray(frame.resize(LOOK, Image.Resampling.BOX)) for frame in self.frames])


def alignment(shot: Shown) -> float | None:
    """Text alignment: mean cosine of the caption and the first, middle and last frame, by open_clip's towers."""
    chosen = [shot.frames[i] for i in sorted({0, len(shot.frames) // 2, len(shot.frames) - 1})]
    words = shot.towers.words(shot.text)
    return float(cosine_similarity(shot.towers.pictures(chosen), words[None]).mean())


def subject(shot: Shown) -> float | None:
    """Subject consistency within a shot (VBench): cosines with the first frame and the one before, averaged."""
    return _steadiness(shot.frames, shot.embed)


def background(shot: Shown) -> float | None:
    """Background consistency within a shot (VBench): the same, by open_clip's towers."""
    return _steadiness(shot.frames, shot.towers.pictures)


def _steadiness(frames: Sequence[Image.Image], embed: Embed) -> float | None:
    if len(frames) < 2:
        return None
    seen = normalize(embed(frames), dim=1)
    return float(((seen[1:] @ seen[0]) + (seen[1:] * seen[:-1]).sum(1)).mean() / 2)


def dynamic(shot: Shown) -> float | None:
    """1 if something moves: the fastest FASTEST of the pixels move by MOVES a frame on average (optical flow)."""
    if len(shot.frames) < 2:
        return None
    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in shot.pixels]
    flow: Any = cv2.DISOpticalFlow.create()
    speed = np.linalg.norm(np.stack([flow.calc(*pair, None) for pair in pairwise(grey)]), axis=-1) / LOOK[1]
    return float(np.mean(speed[speed >= np.quantile(speed, 1 - FASTEST)]) >= MOVES)


def flicker(shot: Shown) -> float | None:
    """Steadiness of light (VBench's temporal flickering): 1 minus the mean change from frame to frame."""
    if len(shot.frames) < 2:
        return None
    return 1 - float(np.abs(np.diff(shot.pixels.astype(np.float32), axis=0)).mean()) / 255


def first_frame(shot: Shown) -> float | None:
    """Peak signal-to-noise ratio of the first frame against the keyframe, in dB."""
    same = shot.keyframe and len(shot.frames) > 1 and shot.keyframe.size == shot.frames[0].size
    return psnr(shot.frames[0], shot.keyframe) if shot.keyframe and same else None


def actions(shot: Shown) -> float | None:
    """Share of the characters that do what a caption of the toy world's says, as read from pixels."""
    return fmean(told.actions) if (told := _clip(shot)) and told.actions else None


def camera(shot: Shown) -> float | None:
    """1 if the camera moves as a caption of the toy world's says, as read from pixels."""
    return float(told.camera) if (told := _clip(shot)) else None


def _clip(shot: Shown) -> Any:
    try:
        return score_clip(shot.frames, shot.caption)
    except ValueError:  # a still, or a caption in another language
        return None


MEASURES: dict[str, Callable[[Shown], float | None]] = {
    "text alignment": alignment,
    "subject consistency": subject,
    "background consistency": background,
    "dynamic degree": dynamic,
    "flicker": flicker,
    "first frame, dB": first_frame,
    "actions": actions,
    "camera": camera,
}  #: of a shot


def same_characters(story: Story, firsts: Sequence[Image.Image], embed: Embed, same: float = SAME) -> list[bool]:
    """Of every later appearance of a character: whether its shot is like its first one, by an embedder (VBench-2.0).

    An embedder that finds faces and describes them measures identity; one that describes the whole picture measures
    how alike shots of the same characters are.
    """
    vectors, first = normalize(embed(firsts), dim=1), story.first_appearances()
    later = [(i, first[tag]) for i, shot in enumerate(story.shots) for tag in shot.tags if first[tag] < i]
    return [bool(vectors[i] @ vectors[j] >= same) for i, j in later]


def cuts(film: Film) -> float | None:
    """F1 of the hard cuts that curation finds in the film, against those it was made with; None of a storyboard."""
    if not film.counts:
        return None
    source, at = probe(film.path), np.cumsum(film.counts[:-1]).tolist()
    found = [(s.start, s.transition) for s in cut_film(source, find_borders(source), DETECTOR, Timeline())][1:]
    return judge_cuts(found, [Event(i, "cut", i, i, 1) for i in at]).figures()["f1"]


def evaluate_films(
    paths: Sequence[Path],
    preset: Preset,
    embed: Embed | None = None,
    judge: Literal["vision", "truth"] | None = None,
    report: Path | None = None,
    vbench: Path | None = None,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Score films and storyboards; `embed` makes vectors of pictures that tell characters apart, else the towers' do.

    Gives `mean`, the figures over all shots or pairs of shots, with their 95 % intervals over films in `ci95` (None of
    one film), `films`, the figures of every shot, and what they were measured by. Exact measures are of stories whose
    captions are in the toy world's language. A `judge` adds its aspects to every film (its answers lie beside the film,
    in `.judge.jsonl`); a page with frames goes to the folder `report`, shots as VBench reads them to `vbench`.
    UserError as `read_film`, before the work.
    """
    films = [read_film(path) for path in paths]
    server = endpoint_from_environment() if judge == "vision" else None
    towers = ClipRetriever(preset.keyframes.towers, "cuda" if torch.cuda.is_available() else "cpu")
    rows, told = list[dict[str, Sequence[bool | float]]](), list[dict[str, Any]]()
    for i, film in enumerate(films):
        on_progress(i, len(films), film.path.name)
        scored, firsts = _score(film, towers, embed or towers.pictures)
        told.append({"film": film.path.name, "title": film.story.title, "shots": scored})
        rows.append(_columns(scored) | _of_film(film, firsts, embed or towers.pictures))
        if judge:
            journal = film.path.with_suffix(".judge.jsonl")
            told[-1]["judge"] = judge_film(film, server, journal) if server else true_judge(film)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name, []) for row in rows] for name in names}
    measured = {"towers": weights_identity(preset.keyframes.towers), "embedder": "given" if embed else "the towers"}
    figures: dict[str, Any] = {"mean": {n: share(own) for n, own in columns.items()}, "measured_by": measured}
    figures["ci95"] = {n: bootstrap(own) if len(films) > 1 else None for n, own in columns.items()}
    figures["films"] = told
    if report:
        write_report(figures, films, report)
    if vbench:
        write_vbench(films, vbench)
    return figures


def load_embedder(name: str) -> Embed:
    """The function MODULE:FUNCTION; UserError if there is none."""
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name}: no such function ({error}); give MODULE:FUNCTION, from pictures to vectors") from None


def _score(film: Film, towers: ClipRetriever, embed: Embed) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Figures of every shot, and the first picture of each."""
    scored, firsts, story = list[dict[str, Any]](), list[Image.Image](), film.story
    for shot, keyframe, frames in zip(story.shots, film.keyframes, film.shots(), strict=True):
        shown = Shown(shot.caption, describe(story, shot.caption), frames, keyframe, towers, embed)
        scored.append({"caption": shot.caption} | {name: measure(shown) for name, measure in MEASURES.items()})
        firsts.append(frames[0])
    return scored, firsts


def _columns(scored: Sequence[dict[str, Any]]) -> dict[str, Sequence[bool | float]]:
    return {name: own for name in MEASURES if (own := [s[name] for s in scored if s[name] is not None])}


def _of_film(film: Film, firsts: Sequence[Image.Image], embed: Embed) -> dict[str, Sequence[bool | float]]:
    """Figures that need a whole film; those that nothing was judged for are left out."""
    told: dict[str, list[Any]] = {"same character": same_characters(film.story, firsts, embed)}
    told |= {"diversity": diversity(firsts), "cuts found": [] if (f1 := cuts(film)) is None else [f1]}
    try:
        scores = score_keyframes([shot.caption for shot in film.story.shots], firsts)
        told |= {"attributes": scores.first, "identity": scores.identity, "sets": scores.sets}
    except ValueError:  # captions in another language
        pass
    return {name: own for name, own in told.items() if own}


def write_report(figures: Mapping[str, Any], films: Sequence[Film], folder: Path) -> None:
    """Write what `evaluate_films` gives as a page, `folder`/index.html, with the first frame of every shot."""
    pictures = []
    for film in films:
        buffers = [io.BytesIO() for _ in film.story.shots]
        for buffer, frames in zip(buffers, film.shots(), strict=True):
            frames[0].save(buffer, "JPEG", quality=90)
        pictures.append([thumb(buffer.getvalue()) for buffer in buffers])
    write_page(
        folder / "index.html", "evaluation.html", title="Scores", pictures=pictures, names=[*MEASURES], **figures
    )


def write_vbench(films: Sequence[Film], folder: Path) -> None:
    """Write the shots of films as VBench reads videos of one's own: one file each, and `prompts.json` with captions.

    UserError for a storyboard, which has no videos.
    """
    prompts = dict[str, str]()
    for film in films:
        if not film.counts:
            raise UserError(f"{film.path}: a storyboard has no videos; give the film that was made of it")
        rate = round(probe(film.path).rate)
        for i, (shot, frames) in enumerate(zip(film.story.shots, film.shots(), strict=True)):
            path = folder / "videos" / f"{film.path.stem}-{i:03d}.mp4"
            prompts[str(path)] = describe(film.story, shot.caption)
            with film_writer(path, *frames[0].size, fps=rate) as add:
                for frame in frames:
                    add(frame)
    write_json(folder / "prompts.json", prompts)


def read_vbench(path: Path) -> dict[str, float]:
    """The means in a file of VBench's results, by dimension; UserError if it is none."""
    try:
        return {name: float(mean) for name, (mean, _) in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no results of VBench ({error}); give its ..._eval_results.json") from None
