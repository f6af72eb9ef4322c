"""From a story to a film: plan keyframes, animate shots, join them; resumable at every keyframe and every shot.

Everything between the story and the film is kept in a working folder: `keyframes/000.png` (with what the planner
read and remembered in its text chunks), `shots/000.tiff` (all frames, lossless), and `*.job.json`, which says whose
work it is. Each file appears whole or not at all, so that after a kill the same command goes on, and since every
picture depends on its inputs and its seed alone, the film is the same.
"""

import errno
import glob
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from cinema.config import WEIGHTS, Preset
from cinema.errors import UserError
from cinema.files import atomic, sweep, write_json
from cinema.keyframes import Keyframe, KeyframePlanner, check_weights, rename
from cinema.media import FilmWriter
from cinema.story import Story, load_story, save_story
from cinema.video import Animator, shot_frames
from cinema.viz import film_strip

Progress = Callable[[int, int, str], None]


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
    """Make a film of a story: plan its keyframes, animate its shots, join them with hard cuts.

    Beside the film appear its storyboard (`.storyboard.png`), its manifest (`.json`) and the working folder.

    Args:
        out: the film, `.mp4`.
        workdir: folder for what is in between; `<film>.work` beside the film if None. The same call goes on from it.
        on_progress: called with (steps done, of how many, message), for the keyframes and then for the shots.

    Raises:
        UserError: the story, the preset's weights or a path cannot be used, or the folder holds other work.
    """
    work = workdir or _workdir(out)
    _check(story, out, preset)
    board = plan_storyboard(story, work, preset, seed, on_progress)
    return _animate(load_story(work / "story.yaml"), board.keyframes, out, work, preset, seed, on_progress)


def plan_storyboard(
    story: Story, out_dir: Path, preset: Preset, seed: int = 0, on_progress: Progress | None = None
) -> Storyboard:
    """Plan a story's keyframes into a folder: pictures, `story.yaml` that names them, a contact sheet, a manifest.

    Raises:
        UserError: as `make_movie`.
    """
    rename(story, preset.tags)  # fails early where the cast is too large
    facts = _facts(story, seed) | {
        "settings": _without(asdict(preset.keyframes), ("weights",)),
        "weights": weights_identity(preset.keyframes.weights),
    }
    names = ("story.yaml", "keyframes", "storyboard.png", "manifest.json")
    with _mended(out_dir), _claimed(out_dir, "plan", facts, names):
        paths = [out_dir / "keyframes" / f"{i:03d}.png" for i in range(len(story.shots))]
        known = {i: image for i, path in enumerate(paths) if (image := _read(path)) is not None}
        if len(known) < len(paths):
            planner = KeyframePlanner.from_preset(preset, _device())
            for keyframe in planner.iterate(story, seed, on_progress, known):
                if keyframe.index not in known:
                    _write_keyframe(keyframe, paths[keyframe.index])
        save_story(_with_keyframes(story, paths, preset), out_dir / "story.yaml")
        picture, manifest = out_dir / "storyboard.png", out_dir / "manifest.json"
        _save(film_strip(paths, [shot.caption for shot in story.shots]), picture)
        write_json(manifest, _plan_manifest(story, paths, preset, seed))
    return Storyboard(out_dir, picture, manifest, paths)


def animate_storyboard(
    folder: Path, out: Path, preset: Preset, seed: int = 0, on_progress: Progress | None = None
) -> MovieResult:
    """Make a film of a folder that `plan_storyboard` wrote; its pictures and captions may have been changed since.

    Raises:
        UserError: the folder is no storyboard, a keyframe is missing or cannot be read, or as `make_movie`.
    """
    if not (folder / "story.yaml").is_file():
        raise UserError(f"{folder}: there is no story.yaml, so it is no storyboard; make one with `cinema plan`")
    story = load_story(folder / "story.yaml")
    for i, shot in enumerate(story.shots):
        if shot.keyframe is None:
            raise UserError(f"{folder / 'story.yaml'}: shot {i} names no keyframe; plan the story again")
    _check(story, out, preset)
    paths = [folder / str(shot.keyframe) for shot in story.shots]
    return _animate(story, paths, out, _workdir(out), preset, seed, on_progress)


def weights_identity(name: str) -> str:
    """What tells weights apart: the SHA-256 of a local folder's weights and settings, or a hub name as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _animate(
    story: Story,
    keyframes: list[Path],
    out: Path,
    work: Path,
    preset: Preset,
    seed: int,
    on_progress: Progress | None,
) -> MovieResult:
    images = [_keyframe(path) for path in keyframes]
    facts = _facts(story, seed) | {
        "settings": _without(asdict(preset.video), ("weights",)),
        "weights": weights_identity(preset.video.weights),
        "keyframes": [hashlib.sha256(image.tobytes()).hexdigest() for image in images],
    }
    with _mended(out), _claimed(work, "film", facts, ("shots",)):
        sweep(out.parent, glob.escape(out.stem))
        paths = [work / "shots" / f"{i:03d}.tiff" for i in range(len(story.shots))]
        known = {
            i for i, path in enumerate(paths) if _is_whole(path, shot_frames(story.shots[i], preset.video), preset)
        }
        if len(known) < len(paths):
            animator = Animator.from_preset(preset, _device())
            for index, frames in animator.animate(story, images, seed, on_progress, known):
                with atomic(paths[index]) as part:
                    frames[0].save(part, save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate")
        counts = _join(paths, out, preset)
        storyboard, manifest = out.with_suffix(".storyboard.png"), out.with_suffix(".json")
        _save(film_strip(images, [shot.caption for shot in story.shots]), storyboard)
        write_json(manifest, _film_manifest(story, keyframes, counts, out, preset, seed))
    return MovieResult(out, storyboard, manifest, keyframes)


def _join(shots: list[Path], out: Path, preset: Preset) -> list[int]:
    """Write the film with hard cuts; frames of every shot."""
    counts = []
    with FilmWriter(out, preset.video.width, preset.video.height, preset.video.fps) as film:
        for path in shots:
            with Image.open(path) as shot:
                for frame in ImageSequence.Iterator(shot):
                    film.add(frame.convert("RGB"))
                counts.append(getattr(shot, "n_frames", 1))
    return counts


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
    manifest = out.with_suffix(".json")
    if manifest.exists() and not _is_manifest_of(out, manifest):
        raise UserError(f"{manifest}: is not this film's manifest, which would replace it; give the film another name")
    FilmWriter(out, preset.video.width, preset.video.height, preset.video.fps)
    for shot in story.shots:
        shot_frames(shot, preset.video)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the film a name of its own")


def _is_manifest_of(film: Path, manifest: Path) -> bool:
    try:
        return bool(json.loads(manifest.read_text(encoding="utf-8"))["film"]["file"] == film.name)
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextmanager
def _claimed(folder: Path, kind: str, facts: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[None]:
    """Work in a folder that is ours; given back if the work fails before anything is there."""
    job = folder / f"{kind}.job.json"
    new = not job.exists()
    _claim(folder, kind, facts, names)
    for place in (folder, *(folder / name for name in names)):
        sweep(place)
    try:
        yield
    except UserError:
        if new and not any((folder / name).exists() for name in names):
            job.unlink()
        raise


def _claim(folder: Path, kind: str, facts: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Take a folder for a piece of work, or go on in it.

    Raises:
        UserError: it holds other work, or files of those names that are not ours.
    """
    job = folder / f"{kind}.job.json"
    if not job.exists():
        if taken := [name for name in names if (folder / name).exists()]:
            raise UserError(f"{folder} already has {taken[0]}, not of this work; choose another folder or remove it")
        write_json(job, facts)
        return
    try:
        held = json.loads(job.read_text(encoding="utf-8"))
    except ValueError:
        held = {}
    held = held if isinstance(held, dict) else {}
    if other := [name for name in facts if held.get(name) != facts[name]]:
        raise UserError(
            f"{folder} holds work of another film (its {' and '.join(other)} differ); "
            "choose another folder or remove it"
        )


def _facts(story: Story, seed: int) -> dict[str, Any]:
    told = story.model_dump(mode="json", exclude={"shots": {"__all__": {"keyframe", "clip"}}})
    durations = [shot.duration for shot in story.shots if "duration" in shot.model_fields_set]
    text = json.dumps([told, durations], sort_keys=True)
    return {"story": hashlib.sha256(text.encode()).hexdigest(), "seed": seed, "cinema": version("cinema")}


def _plan_manifest(story: Story, keyframes: list[Path], preset: Preset, seed: int) -> dict[str, Any]:
    packages = ("cinema", "torch", "diffusers", "transformers", "pillow", "av")
    return {
        "story": story.model_dump(mode="json", exclude_none=True),
        "seed": seed,
        "preset": asdict(preset) | {name: _portable(asdict(getattr(preset, name))) for name in ("keyframes", "video")},
        "weights": {name: weights_identity(getattr(preset, name).weights) for name in ("keyframes", "video")},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": _device(),
        "keyframes": [_told(path) for path in keyframes],
    }


def _film_manifest(
    story: Story, keyframes: list[Path], counts: list[int], out: Path, preset: Preset, seed: int
) -> dict[str, Any]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    film: dict[str, Any] = {"file": out.name, "sha256": hashlib.sha256(out.read_bytes()).hexdigest()}
    film |= {"frames": sum(counts), "fps": preset.video.fps, "size": [preset.video.width, preset.video.height]}
    shots = [
        {"start_frame": start, "end_frame": start + count, "caption": shot.caption}
        for start, count, shot in zip(starts, counts, story.shots, strict=True)
    ]  # with the story above, this is ground truth as curation reads it
    return _plan_manifest(story, keyframes, preset, seed) | {"shots": shots, "film": film}


def _told(path: Path) -> dict[str, Any]:
    """What a keyframe's file says about itself; a picture from elsewhere says nothing."""
    with Image.open(path) as image:
        text = image.info
    told = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with suppress(ValueError):  # a picture from elsewhere may use the same words for something else
        told |= {k: json.loads(text[k]) for k in ("caption", "remembered") if k in text}
    return told


def _write_keyframe(keyframe: Keyframe, path: Path) -> None:
    text = PngInfo()
    text.add_itxt("caption", json.dumps(keyframe.caption))
    text.add_itxt("remembered", json.dumps([list(pair) for pair in keyframe.remembered]))
    with atomic(path) as part:
        keyframe.image.save(part, pnginfo=text)


def _with_keyframes(story: Story, paths: list[Path], preset: Preset) -> Story:
    """The story with its keyframes named, and with every duration said."""
    told = story.model_copy(deep=True)
    for shot, path in zip(told.shots, paths, strict=True):
        shot.keyframe = f"{path.parent.name}/{path.name}"
        if "duration" not in shot.model_fields_set:
            shot.duration = preset.video.frames / preset.video.fps
    return told


def _keyframe(path: Path) -> Image.Image:
    image = _read(path)
    if image is None:
        raise UserError(f"{path}: this keyframe is missing or no picture; put it back or plan the story again")
    return image


def _read(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError):  # missing, no picture, cut off, or far too large
        return None


def _save(image: Image.Image, path: Path) -> None:
    with atomic(path) as part:
        image.save(part)


@contextmanager
def _mended(path: Path) -> Iterator[None]:
    """Say what the disk has against it in one sentence; what is finished stays."""
    try:
        yield
    except OSError as error:
        cure = "make room and run it again" if error.errno == errno.ENOSPC else "choose another place"
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {cure}") from error


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with weights of the package named from the package on."""
    path, package = Path(settings["weights"]), WEIGHTS.parent.parent
    inside = path.is_absolute() and path.is_relative_to(package)
    return settings | {"weights": path.relative_to(package).as_posix() if inside else settings["weights"]}


def _without(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in names}


def _workdir(out: Path) -> Path:
    return out.with_name(f"{out.stem}.work")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
