"""From a story to a film: plan keyframes, animate shots, join them; a killed run goes on and ends as the same film.

Between them lie, each whole or not at all, `keyframes/000.png` (with what the planner read and remembered in its text
chunks), `shots/000.tiff` (all frames, lossless) and `*.job.json`, which says whose work it is."""

import errno
import glob
import hashlib
import json
import platform
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from cinema.config import WEIGHTS, KeyframeSettings, Preset, VideoSettings
from cinema.errors import UserError
from cinema.files import atomic, sweep, write_json
from cinema.keyframes import KeyframePlanner, check_weights, rename
from cinema.media import FilmWriter
from cinema.progress import Progress
from cinema.story import Story, load_story, save_story
from cinema.video import Animator, shot_frames
from cinema.viz import film_strip

_TOLD = ("caption", "remembered", "recipe")  # what a keyframe's file says of it


@dataclass(frozen=True)
class Storyboard:
    """A planned story: its folder, the contact sheet, the manifest and a keyframe per shot."""

    folder: Path
    picture: Path
    manifest: Path
    keyframes: list[Path]


@dataclass(frozen=True)
class MovieResult:
    """A finished film, the contact sheet of its keyframes, and everything needed to make it again, as JSON."""

    film: Path
    storyboard: Path
    manifest: Path
    keyframes: list[Path]


def make_movie(
    story: Story,
    out: Path,
    preset: Preset,
    seed: int = 0,
    workdir: Path | None = None,
    on_progress: Progress | None = None,
) -> MovieResult:
    """Make a film (.mp4) of a story: plan its keyframes, animate its shots, join them with hard cuts.

    Beside the film appear its storyboard (`.storyboard.png`), its manifest (`.json`) and the working folder (`.work`,
    if no other is given), from which the same call goes on. UserError if the story, the preset's weights or a path
    cannot be used, or the folder holds other work.
    """
    work = workdir or out.with_name(f"{out.stem}.work")
    _check(story, out, preset)
    board = plan_storyboard(story, work, preset, seed, on_progress)
    return _animate(load_story(work / "story.yaml"), board.keyframes, out, work, preset, seed, on_progress)


def plan_storyboard(
    story: Story,
    out_dir: Path,
    preset: Preset,
    seed: int = 0,
    on_progress: Progress | None = None,
    edited: bool = False,
) -> Storyboard:
    """Plan a story's keyframes into a folder: pictures, `story.yaml` that names them, a contact sheet, a manifest.

    If the story was `edited` since, what does not depend on the edit is kept: of what it was drawn, and from what, is
    in every picture's file. Pictures that were put there by hand stay. UserError as for `make_movie`.
    """
    rename(story, preset.tags)  # fails early where the cast is too large
    script, picture, manifest = (out_dir / name for name in ("story.yaml", "storyboard.png", "manifest.json"))
    paths = [out_dir / "keyframes" / f"{i:03d}.png" for i in range(len(story.shots))]
    places = [script, out_dir / "keyframes", picture, manifest]
    job, facts = out_dir / "plan.job.json", _facts(story, seed, preset.keyframes)
    same = job.is_file() and not _differing(job, facts)
    with _work(job, facts, places, out_dir, {"story"} if edited else set()):
        if not same or not all(_read(path) for path in paths):
            planner, kept = KeyframePlanner.from_preset(preset, _device()), set[int]()

            def keep(shot: int, recipe: str) -> Image.Image | None:
                image = _read(paths[shot], recipe)
                kept.update([shot] if image else [])
                return image

            for keyframe in planner.iterate(story, seed, on_progress, None, keep):
                if keyframe.index not in kept:
                    text = PngInfo()
                    for key in _TOLD:
                        text.add_itxt(key, json.dumps(getattr(keyframe, key)))
                    with atomic(paths[keyframe.index]) as part:
                        keyframe.image.save(part, pnginfo=text)
        for path in set((out_dir / "keyframes").glob("*.png")) - set(paths):  # of shots that the story had before
            path.unlink() if _recipe(path) else None
        told = story.model_copy(deep=True)
        for shot, path in zip(told.shots, paths, strict=True):
            shot.keyframe = path.relative_to(out_dir).as_posix()
            if "duration" not in shot.model_fields_set:
                shot.duration = preset.video.frames / preset.video.fps
        save_story(told, script)
        _contact_sheet(story, paths, picture)
        write_json(manifest, _manifest(story, paths, preset, seed))
    return Storyboard(out_dir, picture, manifest, paths)


def animate_storyboard(
    folder: Path, out: Path, preset: Preset, seed: int = 0, on_progress: Progress | None = None
) -> MovieResult:
    """Make a film of a folder that `plan_storyboard` wrote; its pictures and captions may have been changed since.

    UserError if the folder is no storyboard, a keyframe is missing or cannot be read, or as for `make_movie`.
    """
    script = folder / "story.yaml"
    if not script.is_file():
        raise UserError(f"{folder}: there is no story.yaml, so it is no storyboard; make one with `cinema plan`")
    story, paths = load_story(script), list[Path]()
    for i, shot in enumerate(story.shots):
        if shot.keyframe is None:
            raise UserError(f"{script}: shot {i} names no keyframe; plan the story again")
        paths.append(folder / shot.keyframe)
    _check(story, out, preset)
    return _animate(story, paths, out, out.with_name(f"{out.stem}.work"), preset, seed, on_progress)


def weights_identity(name: str) -> str:
    """What tells weights apart: the SHA-256 of a local folder's weights and settings, or a hub name as it is."""
    folder, digest = Path(name), hashlib.sha256()
    if not folder.is_dir():
        return name
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _animate(
    story: Story, keyframes: list[Path], out: Path, work: Path, preset: Preset, seed: int, tell: Progress | None
) -> MovieResult:
    images = list[Image.Image]()
    for path in keyframes:
        if not (image := _read(path)):
            raise UserError(f"{path}: this keyframe is missing or no picture; put it back or plan the story again")
        images.append(image)
    facts = _facts(story, seed, preset.video) | {"keyframes": [_sha256(image.tobytes()) for image in images]}
    paths = [work / "shots" / f"{i:03d}.tiff" for i in range(len(story.shots))]
    counts = [shot_frames(shot, preset.video) for shot in story.shots]
    with _work(work / "film.job.json", facts, [work / "shots"], out):
        sweep(out.parent, glob.escape(out.stem))
        known = {i for i, (path, count) in enumerate(zip(paths, counts, strict=True)) if _is_whole(path, count, preset)}
        if len(known) < len(paths):
            animator = Animator.from_preset(preset, _device())
            for index, frames in animator.animate(story, images, seed, tell, known):
                with atomic(paths[index]) as part:
                    frames[0].save(part, save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate")
        _join(paths, out, preset)
        storyboard, manifest = out.with_suffix(".storyboard.png"), out.with_suffix(".json")
        _contact_sheet(story, images, storyboard)
        write_json(manifest, _manifest(story, keyframes, preset, seed) | _ground_truth(story, counts, out, preset))
    return MovieResult(out, storyboard, manifest, keyframes)


def _join(shots: list[Path], out: Path, preset: Preset) -> None:
    """Write the film with hard cuts."""
    with FilmWriter(out, preset.video.width, preset.video.height, preset.video.fps) as film:
        for path in shots:
            with Image.open(path) as shot:
                for frame in ImageSequence.Iterator(shot):
                    film.add(frame.convert("RGB"))


def _is_whole(path: Path, count: int, preset: Preset) -> bool:
    """Whether a shot's file holds all its frames; one that was cut off or changed is made again."""
    try:
        with catch_warnings(action="ignore"), Image.open(path) as shot:
            shot.seek(count - 1)
            shot.load()
            return getattr(shot, "n_frames", 1) == count and shot.size == (preset.video.width, preset.video.height)
    except (OSError, EOFError, ValueError, TypeError, SyntaxError):  # what Pillow raises for broken TIFFs
        return False


def _check(story: Story, out: Path, preset: Preset) -> None:
    """What can be found wrong before the work."""
    check_weights(preset.video.weights, "video")
    FilmWriter(out, preset.video.width, preset.video.height, preset.video.fps)
    manifest, ours = out.with_suffix(".json"), False
    with suppress(OSError, ValueError, LookupError, TypeError):
        ours = json.loads(manifest.read_text(encoding="utf-8"))["film"]["file"] == out.name
    if manifest.exists() and not ours:
        raise UserError(f"{manifest}: is not this film's manifest, which would replace it; give the film another name")
    for shot in story.shots:
        shot_frames(shot, preset.video)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the film a name of its own")


@contextmanager
def _work(
    job: Path, facts: dict[str, Any], places: list[Path], goal: Path, free: Collection[str] = ()
) -> Iterator[None]:
    """A piece of work in a folder, begun or gone on with; given back if it fails before anything is there.

    Facts that are `free` may have changed since. UserError if the folder holds other work, or files in those places
    that are not ours, or the disk refuses.
    """
    folder, new, cure = job.parent, not job.exists(), "choose another folder or remove it"
    try:
        if new:
            if taken := [place.name for place in places if place.exists()]:
                raise UserError(f"{folder} already has {taken[0]}, not of this work; {cure}")
            write_json(job, facts)
        elif other := _differing(job, facts):
            if not set(other) <= set(free):
                raise UserError(f"{folder} holds work of another film (its {' and '.join(other)} differ); {cure}")
            write_json(job, facts)
        for place in (folder, *places):
            sweep(place)
        yield
    except OSError as error:
        cure = "make room and run it again" if error.errno == errno.ENOSPC else "choose another place"
        raise UserError(f"{goal}: cannot be written ({error.strerror or error}); {cure}") from error
    except UserError:
        if new and job.exists() and not any(place.exists() for place in places):
            job.unlink()
        raise


def _differing(job: Path, facts: dict[str, Any]) -> list[str]:
    """Facts of which a job's file holds another, or all if it is not ours."""
    try:
        held = json.loads(job.read_text(encoding="utf-8"))
        return [name for name in facts if held.get(name) != facts[name]]
    except (ValueError, AttributeError):
        return list(facts)


def _facts(story: Story, seed: int, settings: KeyframeSettings | VideoSettings) -> dict[str, Any]:
    """What makes work the same: if one of these differs, so do the pictures."""
    told = story.model_dump(mode="json", exclude={"shots": {"__all__": {"keyframe", "clip"}}})
    durations = [shot.duration for shot in story.shots if "duration" in shot.model_fields_set]
    digest, numbers = _sha256(json.dumps([told, durations], sort_keys=True).encode()), asdict(settings)
    weights = weights_identity(numbers.pop("weights"))
    if "towers" in numbers:
        numbers["towers"] = weights_identity(numbers["towers"]) if numbers["retrieval"] == "clip" else ""
    return {"story": digest, "seed": seed, "cinema": version("cinema"), "settings": numbers, "weights": weights}


def _manifest(story: Story, keyframes: list[Path], preset: Preset, seed: int) -> dict[str, Any]:
    packages = ("cinema", "torch", "diffusers", "transformers", "pillow", "av")
    settings, package = asdict(preset), WEIGHTS.parent.parent
    weights = {part: settings[part]["weights"] for part in ("keyframes", "video")}
    for part, key in (("keyframes", "weights"), ("keyframes", "towers"), ("video", "weights")):
        if (path := Path(settings[part][key])).is_absolute() and path.is_relative_to(package):  # as from the package on
            settings[part][key] = path.relative_to(package).as_posix()
    told: dict[str, Any] = {"story": story.model_dump(mode="json", exclude_none=True), "seed": seed, "preset": settings}
    told["weights"] = {part: weights_identity(path) for part, path in weights.items()}
    told["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return told | {"device": _device(), "keyframes": [_told(path) for path in keyframes]}


def _ground_truth(story: Story, counts: list[int], out: Path, preset: Preset) -> dict[str, Any]:
    """Shots and film of a manifest, as curation reads them."""
    told = zip(pairwise(accumulate(counts, initial=0)), story.shots, strict=True)
    shots = [{"start_frame": start, "end_frame": end, "caption": shot.caption} for (start, end), shot in told]
    film: dict[str, Any] = {"file": out.name, "sha256": _sha256(out.read_bytes()), "frames": sum(counts)}
    film |= {"fps": preset.video.fps, "size": [preset.video.width, preset.video.height]}
    return {"shots": shots, "film": film}


def _told(path: Path) -> dict[str, Any]:
    """What a keyframe's file says about itself; a picture from elsewhere says nothing."""
    told = {"file": path.name, "sha256": _sha256(path.read_bytes())}
    with Image.open(path) as image, suppress(ValueError):  # the words may stand for something else
        told |= {key: json.loads(image.info[key]) for key in _TOLD if key in image.info}
    return told


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _recipe(path: Path) -> str:
    """Of what a picture says that it was made; empty if it is no picture, or of somebody else."""
    with suppress(OSError, Image.DecompressionBombError, ValueError), Image.open(path) as image:
        return json.loads(image.info.get("recipe", '""'))
    return ""


def _read(path: Path, recipe: str = "") -> Image.Image | None:
    """A picture; None if there is none, or it was made by another recipe than this."""
    if recipe and _recipe(path) not in ("", recipe):
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError):  # missing, no picture, cut off, or far too large
        return None


def _contact_sheet(story: Story, pictures: Sequence[Image.Image | Path], path: Path) -> None:
    with atomic(path) as part:
        film_strip(pictures, [shot.caption for shot in story.shots]).save(part)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
