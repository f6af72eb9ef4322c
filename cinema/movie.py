"""From a story to a film: plan keyframes, animate shots, join them; a killed run goes on and ends as the same film.

Between them lie, each whole or not at all, `keyframes/000.png` (with what the planner read and remembered in a text
chunk), `shots/000.tiff` (all frames, lossless) and `*.job.json`, which says whose work it is."""

import glob
import json
import os
import platform
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import file_digest, sha256
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IMAGEDESCRIPTION

from cinema.config import WEIGHTS, KeyframeSettings, Preset, VideoSettings
from cinema.credentials import sign, signing_key
from cinema.errors import UserError
from cinema.files import atomic, sweep, writable, write_json
from cinema.keyframes import KeyframePlanner, check_weights, rename
from cinema.media import CODECS, Shots, film_writer, write_captions
from cinema.policy import concerns
from cinema.progress import Progress
from cinema.provenance import Watermark
from cinema.story import Story, load_story, save_story
from cinema.video import Animator, shot_frames
from cinema.viz import film_strip

Mark = Callable[[Image.Image], Image.Image]
_CHUNK = "cinema"  # of a keyframe's file: what it was drawn of, and from what


@dataclass(frozen=True)
class Storyboard:
    """A planned story: the contact sheet, the manifest and a keyframe per shot."""

    storyboard: Path
    manifest: Path
    keyframes: list[Path]


@dataclass(frozen=True)
class MovieResult(Storyboard):
    """A finished film; its manifest has everything needed to make it again."""

    film: Path
    captions: Path  #: a WebVTT track


def make_movie(
    story: Story,
    out: Path,
    preset: Preset,
    seed: int = 0,
    on_progress: Progress | None = None,
    marked: bool = True,
) -> MovieResult:
    """Make a film (.mp4 or .webm) of a story: plan its keyframes, animate its shots, join them with hard cuts.

    Beside the film appear its storyboard (`.storyboard.png`), its captions (`.vtt`), its manifest (`.json`) and the
    working folder (`.work`), from which the same call goes on. If `marked`, its pictures have a watermark and an MP4 is
    signed. UserError if the story, the preset's weights, the signing key or a path cannot be used, or the folder holds
    other work.
    """
    _check(story, out, preset, marked)
    work = out.with_name(f"{out.stem}.work")
    plan_storyboard(story, work, preset, seed, on_progress, marked=marked)
    return animate_storyboard(work, out, preset, seed, on_progress, marked=marked)


def plan_storyboard(
    story: Story,
    out_dir: Path,
    preset: Preset,
    seed: int = 0,
    on_progress: Progress | None = None,
    edited: bool = False,
    marked: bool = True,
) -> Storyboard:
    """Plan a story's keyframes into a folder: pictures, `story.yaml` that names them, a contact sheet, a manifest.

    If the story or a picture was `edited` since, what does not depend on the edit is kept: of what it was drawn, and
    from what, is in every picture's file. Pictures that were put there by hand stay. UserError as for `make_movie`.
    """
    rename(story, preset.tags)  # fails early where the cast is too large
    noted = {"marked": marked, "concerns": concerns(story)}
    paths = [out_dir / "keyframes" / f"{i:03d}.png" for i in range(len(story.shots))]
    board = Storyboard(out_dir / "storyboard.png", out_dir / "manifest.json", paths)
    script, facts = out_dir / "story.yaml", _facts(story, seed, preset.keyframes, marked)

    def keep(shot: int, recipe: str) -> Image.Image | None:
        image = _read(paths[shot])
        return image if image and _told(image).get("recipe", recipe) == recipe else None

    places = [script, out_dir / "keyframes", board.storyboard, board.manifest]
    _begin(out_dir / "plan.job.json", facts, places, "story" if edited else "")
    if edited or not board.manifest.is_file() or not all(map(_read, paths)):
        planner = KeyframePlanner.from_preset(preset, _device())
        planner.mark = _mark if marked else None
        for keyframe in planner.iterate(story, seed, on_progress, None, keep):
            if not keep(keyframe.index, keyframe.recipe):
                told, text = {n: getattr(keyframe, n) for n in ("caption", "remembered", "recipe")}, PngInfo()
                text.add_itxt(_CHUNK, json.dumps(told))
                with atomic(paths[keyframe.index]) as part:
                    keyframe.image.save(part, pnginfo=text)
    planned = story.model_copy(deep=True)
    for shot, path in zip(planned.shots, paths, strict=True):
        shot.keyframe = path.relative_to(out_dir).as_posix()
        if "duration" not in shot.model_fields_set:
            shot.duration = preset.video.frames / preset.video.fps
    save_story(planned, script)
    _write_papers(board, story, preset, seed, **noted)
    return board


def animate_storyboard(
    folder: Path,
    out: Path,
    preset: Preset,
    seed: int = 0,
    on_progress: Progress | None = None,
    again: Collection[int] = (),
    take: int = 1,
    marked: bool = True,
) -> MovieResult:
    """Make a film of a folder that `plan_storyboard` wrote; its pictures and captions may have been changed since.

    Of a film that is made, shots can be drawn `again`, as another `take`, which leaves the others as they are.
    UserError if the folder is no storyboard, a keyframe is missing or cannot be read, a shot is to be drawn again that
    the film has not or before all are there, or as for `make_movie`.
    """
    script, work = folder / "story.yaml", out.with_name(f"{out.stem}.work")
    if not script.is_file():
        raise UserError(f"{folder}: there is no story.yaml, so it is no storyboard; make one with `cinema plan`")
    story, keyframes, images = load_story(script), list[Path](), list[Image.Image]()
    for i, shot in enumerate(story.shots):
        if shot.keyframe is None:
            raise UserError(f"{script}: shot {i} names no keyframe; plan the story again")
        keyframes.append(folder / shot.keyframe)
        if not (image := _read(keyframes[-1])):
            raise UserError(f"{keyframes[-1]}: this keyframe is missing or no picture; put it back or plan again")
        images.append(image)
    counts, paths = _check(story, out, preset, marked), [work / "shots" / f"{i:03d}.tiff" for i in range(len(images))]
    digests = [sha256(image.tobytes()).hexdigest() for image in images]
    facts = _facts(story, seed, preset.video, marked) | {"keyframes": digests}
    picture, manifest, captions = (out.with_suffix(ending) for ending in (".storyboard.png", ".json", ".vtt"))
    result = MovieResult(picture, manifest, keyframes, out, captions)
    _begin(work / "film.job.json", facts, [work / "shots", result.manifest])
    sweep(out.parent, glob.escape(out.stem))
    drawn = {i: partial(_frames, path) for i, path in enumerate(paths) if path.is_file()}
    if again and not {*again} <= {*drawn} == {*range(len(paths))}:
        had = f"{len(drawn)} of {len(paths)} shots are there"
        raise UserError(f"{out}: {had}; shots of a whole film can be drawn again: finish it first, and count from 1")
    for i in again:
        del drawn[i]
    if len(drawn) < len(paths):
        animator = Animator.from_preset(preset, _device())
        for index, frames in animator.animate(story, images, seed, on_progress, drawn, take if again else 0):
            about: Any = {"compression": "tiff_adobe_deflate", "description": str(take if again else 0)}
            with atomic(paths[index]) as part:
                frames[0].save(part, save_all=True, append_images=frames[1:], **about)
    told = [(shot.caption, count) for shot, count in zip(story.shots, counts, strict=True)]
    run = run_id(story, seed, preset)
    _join(paths, out, preset.video, told, Watermark(int(run, 16)).embed if marked else None)
    if signed := marked and out.suffix == ".mp4":
        sign(out, story.title, {"run": run, "story_sha256": _digest(_script(story)), "seed": seed} | _models(preset))
    write_captions(result.captions, told, preset.video.fps)
    spans = zip(told, accumulate(counts), map(_take, paths), strict=True)
    shots = [{"start_frame": z - n, "end_frame": z, "caption": said, "take": take} for (said, n), z, take in spans]
    film: dict[str, Any] = {"file": out.name, "sha256": sha256(out.read_bytes()).hexdigest(), "frames": sum(counts)}
    film |= {"fps": preset.video.fps, "size": [preset.video.width, preset.video.height]}
    noted = {"run": run, "marked": marked, "signed": signed, "concerns": concerns(story)}
    _write_papers(result, story, preset, seed, shots=shots, film=film, **noted)
    return result


def weights_identity(name: str) -> str:
    """What tells weights apart: the SHA-256 of a local folder's weights and settings, or a hub name as it is."""
    folder, digest = Path(name), sha256()
    if not folder.is_dir():
        return name
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _mark(image: Image.Image, digest: str) -> Image.Image:
    """A picture with a watermark that carries the digest's first seven digits."""
    return Watermark(int(digest[:7], 16)).embed(image)


def run_id(story: Story, seed: int, preset: Preset) -> str:
    """What the watermark of a film says: the first digits of a digest of what is told, the seed and the weights.

    That of a keyframe says its recipe, since an edit of the story leaves what does not depend on it.
    """
    weights = [weights_identity(part.weights) for part in (preset.keyframes, preset.video)]
    return _digest([_script(story), seed, weights])[:7]


def _script(story: Story) -> dict[str, Any]:
    """A story without files and times: of keyframes planned and of a film made the same."""
    return story.model_dump(mode="json", exclude={"shots": {"__all__": {"keyframe", "clip", "duration"}}})


def _digest(facts: Any) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _models(preset: Preset) -> dict[str, str]:
    """Which weights draw, and under which licence, as far as a model card beside them says."""
    told: dict[str, str] = {}
    for part in ("keyframes", "video"):
        name = getattr(preset, part).weights
        cards = [card for folder in (Path(name), Path(name).parent) if (card := folder / "README.md").is_file()]
        found = re.search(r"^license: *(\S+)", "\n".join(card.read_text(encoding="utf-8") for card in cards), re.M)
        licence = found[1] if found else "not stated beside the weights"
        told |= {f"{part}_model": weights_identity(name), f"{part}_licence": licence}
    return told


def _join(shots: list[Path], out: Path, settings: VideoSettings, told: Shots, mark: Mark | None) -> None:
    """Write the film with hard cuts."""
    with film_writer(out, settings.width, settings.height, settings.fps, shots=told) as add:
        for path in shots:
            for frame in _frames(path):
                add(mark(frame) if mark else frame)


def _frames(shot: Path) -> list[Image.Image]:
    with Image.open(shot) as frames:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(frames)]


def _take(shot: Path) -> int:
    with Image.open(shot) as frames:
        return int(frames.getexif()[IMAGEDESCRIPTION])


def _check(story: Story, out: Path, preset: Preset, marked: bool) -> list[int]:
    """Frames of the shots, after what can be found wrong before the work."""
    check_weights(preset.video.weights, "video")
    concerns(story)
    if out.suffix not in CODECS:
        raise UserError(f"{out}: films are written as H.264 or VP9; give a name that ends in {' or '.join(CODECS)}")
    writable(out)
    if marked:
        signing_key()
    return [shot_frames(shot, preset.video) for shot in story.shots]


def _begin(job: Path, facts: dict[str, Any], places: list[Path], free: str = "") -> None:
    """Begin work in a folder, or go on with it; UserError if files in those places are of other work.

    The fact that is `free` may have changed; then the last of the places, which says that all is done, goes first.
    """
    facts = json.loads(json.dumps(facts))
    held = json.loads(job.read_text(encoding="utf-8")) if job.is_file() else {}
    other = [name for name in facts if held.get(name) != facts[name]]
    taken = [place.name for place in places if place.exists()]
    if taken and not set(other) <= {free}:
        why = f"holds work of another film (its {' and '.join(other)} differ)"
        why = why if job.exists() else f"already has {taken[0]}, not of this work"
        raise UserError(f"{job.parent} {why}; choose another folder or remove it")
    if other:
        places[-1].unlink(missing_ok=True)
    write_json(job, facts)
    for place in (job.parent, *places):
        sweep(place)


def _facts(story: Story, seed: int, settings: KeyframeSettings | VideoSettings, marked: bool) -> dict[str, Any]:
    """What makes work the same: if one of these differs, so do the pictures."""
    told = story.model_dump(mode="json", exclude_unset=True, exclude={"shots": {"__all__": {"keyframe", "clip"}}})
    numbers = asdict(settings)
    numbers |= {key: weights_identity(numbers[key]) for key in ("weights", "towers") if key in numbers}
    return {"story": told, "seed": seed, "cinema": version("cinema"), "marked": marked} | numbers


def _write_papers(board: Storyboard, story: Story, preset: Preset, seed: int, **more: Any) -> None:
    """Write the contact sheet, and the manifest: how the work can be made again, and `more`, as curation reads it."""
    with atomic(board.storyboard) as part:
        film_strip(board.keyframes, [shot.caption for shot in story.shots]).save(part)
    settings = json.loads(json.dumps(asdict(preset)).replace(f"{WEIGHTS.parent.parent}{os.sep}", ""))
    told: dict[str, Any] = {"story": story.model_dump(mode="json", exclude_none=True), "seed": seed, "preset": settings}
    told["weights"] = {name: weights_identity(getattr(preset, name).weights) for name in ("keyframes", "video")}
    packages = ("cinema", "torch", "diffusers", "transformers", "pillow", "av")
    told["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    files = [{"file": p.name, "sha256": sha256(p.read_bytes()).hexdigest()} | _told(_read(p)) for p in board.keyframes]
    write_json(board.manifest, told | {"device": _device(), "keyframes": files} | more)


def _read(path: Path) -> Image.Image | None:
    """A picture; None if it is missing, no picture, or cut off."""
    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:  # what Pillow raises
        return image.convert("RGB")
    return None


def _told(image: Image.Image | None) -> dict[str, Any]:
    """What a keyframe's file says about itself; a picture from elsewhere, or none, says nothing."""
    return json.loads(image.info.get(_CHUNK, "{}")) if image else {}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
