"""The command line; heavy imports are inside the commands, and one whose module is not there is not offered.

Results go to standard output, the rest to standard error. Exit codes: 0 done, 1 the user can mend it (one sentence;
CINEMA_DEBUG=1 shows where), 2 wrong usage, 3 some films could not be curated, 4 the limit of spending."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from cinema import config
from cinema.errors import UserError
from cinema.files import write_json
from cinema.story import Story, load_cast, load_story, read_text, save_story

Result = TypeVar("Result")
STORYLINE_SUFFIXES, STORY_SUFFIXES = (".txt", ".md"), (".yaml", ".yml")
DETECTOR_HELP = "What finds the cuts: planes (if not given), content, adaptive, adaptive-luma, or transnetv2."
AnnotatorName = StrEnum("AnnotatorName", ["truth", "vision", "local", "none"])


def _writable(path: Path | None) -> Path | None:
    """The path, if a file can be written there: asked before the work, not after it."""
    above = next(folder for folder in path.absolute().parents if folder.exists()) if path else Path()
    if path and ((path.exists() and not path.is_file()) or not above.is_dir() or not os.access(above, os.W_OK)):
        raise UserError(f"{path}: figures cannot be written there; give a file in a folder that can be written to")
    return path


Preset = Annotated[str | None, typer.Option(help="toy, small or flux; CINEMA_PRESET if not given, else toy.")]
Retrieval = Annotated[
    str | None, typer.Option(help="Who chooses what is remembered: recency, clip, t5, random or oracle.")
]
Pairs = Annotated[str, typer.Option(help="Numbers of pairs, such as 4,8,12.")]
Seed = Annotated[int, typer.Option(help="Another seed, another result; the same seed, the same.", min=0)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", callback=_writable)]
StoryFile = Annotated[Path, typer.Argument(help="A story in YAML, or a storyline in plain English (.txt).")]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")]
Board = Annotated[Path, typer.Argument(help="A folder that `cinema plan` wrote.")]
Workdir = Annotated[Path | None, typer.Option(help="Keep what is in between here, and go on from it.")]
Films = Annotated[int, typer.Option(help="How many films.", min=1)]
Stories = Annotated[int, typer.Option(help="How many held-out stories.", min=1)]
Shots = Annotated[int, typer.Option(help="Shots a story.", min=1, max=500)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A training configuration in YAML.")]
FilmFile = Annotated[Path, typer.Option("--out", "-o", help="The film to write, .mp4.")]


def write(
    storyline: Annotated[Path, typer.Argument(help="A text file: what happens, in plain English.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The story to write, .yaml.")],
    title: Annotated[str | None, typer.Option(help="Title of the story.")] = None,
) -> None:
    """Turn a storyline in plain English into a story, and say what was understood."""
    if out.suffix.lower() not in STORY_SUFFIXES:
        raise UserError(f"{out}: a story is written as YAML; give a name that ends in .yaml")
    story = _story(storyline, title, writing=True)
    save_story(story, out)
    _say(f"{out}: {_count(story.shots, 'shot')}, {_count(story.cast, 'character')}, {_count(story.sets, 'set')}")


def movie(
    story: StoryFile,
    out: FilmFile,
    preset: Preset = None,
    retrieval: Retrieval = None,
    seed: Seed = 0,
    workdir: Workdir = None,
    json: Json = None,
) -> None:
    """Make a film from a story: plan its keyframes, animate its shots, join them."""
    script, chosen = _story(story), _remembering(config.preset(preset), retrieval)
    from cinema.movie import make_movie

    _figures(_watch(make_movie, script, out, chosen, seed, workdir), json)
    _say(f"{out}: {_count(script.shots, 'shot')}")


def plan(
    story: StoryFile,
    out: Folder,
    preset: Preset = None,
    retrieval: Retrieval = None,
    edit: Annotated[bool, typer.Option("--edit", help="The story was edited: plan again what depends on it.")] = False,
    seed: Seed = 0,
) -> None:
    """Plan a story's keyframes: a storyboard in a folder, which `cinema animate` turns into a film."""
    script, chosen = _story(story), _remembering(config.preset(preset), retrieval)
    from cinema.movie import plan_storyboard

    _watch(plan_storyboard, script, out, chosen, seed, edited=edit)
    _say(f"{out}: {_count(script.shots, 'keyframe')}")


def animate(storyboard: Board, out: FilmFile, preset: Preset = None, seed: Seed = 0) -> None:
    """Make a film from a planned storyboard."""
    chosen = config.preset(preset)
    from cinema.movie import animate_storyboard

    _watch(animate_storyboard, storyboard, out, chosen, seed)
    _say(f"{out}: written")


def curate(
    films: Annotated[list[str], typer.Argument(metavar="FILM_OR_FOLDER...", help="Films, or folders with films.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write into; s3://... and the like work too.")],
    annotator: Annotated[AnnotatorName, typer.Option(help="Who writes captions.")] = AnnotatorName.none,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the local annotator's model.")] = None,
    cast: Annotated[Path | None, typer.Option(help="YAML whose `cast` captions may name, or a folder of such.")] = None,
    detector: Annotated[str | None, typer.Option(help=DETECTOR_HELP)] = None,
    video: Annotated[bool, typer.Option("--video", help="Also write the shots as videos, OUT/clips.")] = False,
    workers: Annotated[int | None, typer.Option(help="Films at a time; all cores if not given.", min=1)] = None,
    max_requests: Annotated[int | None, typer.Option(help="Requests for captions it may send.", min=0)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens for captions it may pay for.", min=0)] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds without progress that a film may take.", min=1, max=1e6)
    ] = 900.0,
    ray: Annotated[bool, typer.Option("--ray", help="Spread films over a Ray cluster.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Also write pages to look through, OUT/report.")] = False,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Turn films into shots, keyframes and captions on disk; what is broken is reported and skipped."""
    chosen = config.preset(preset)
    people = cast if cast and cast.is_dir() else load_cast(cast) if cast else []
    from cinema import curation

    makers: dict[str, Callable[[], curation.Annotator]] = {
        "truth": curation.GroundTruthAnnotator,
        "vision": lambda: curation.VisionAnnotator(people),
        "local": lambda: curation.LocalAnnotator(model, people),
        "none": curation.NoAnnotator,
    }
    options: dict[str, Any] = {"annotator": makers[annotator.value](), "height": chosen.keyframes.height}
    options |= {"workers": workers or (1 if annotator == "local" else _cores()), "limit_s": time_limit}
    options |= {"video": video, "ray": ray, "max_requests": max_requests, "max_tokens": max_tokens}
    options |= {"detector": detector} if detector else {}
    result = _watch(curation.curate, curation.find_films(films, out), out, **options)
    rows = [(curation.shown(str(f.film)), f.status, f.shots, f.kept, f.reason) for f in result.films]
    _table(("film", "status", "shots", "kept", "reason"), rows, result, json)
    if report:
        _say(f"{curation.write_report(out, options['workers'])}: open it in a browser")
    if result.out_of_money:
        _say(f"the spending limit is reached after {result.requests} requests; the same command goes on from here")
        raise typer.Exit(4)
    if result.failed:
        _say(f"{len(result.failed)} of {len(result.films)} films could not be curated; the table says why")
        raise typer.Exit(3)


def train(settings: ConfigFile, out: Folder, resume: Resume = False) -> None:
    """Train a model; a run that was stopped goes on with --resume and ends as if it never had been."""
    if not settings.is_file():
        raise UserError(f"{settings}: there is no such file; give the path of a training configuration in YAML")
    from cinema import training

    _watch(training.train, settings, out, resume)
    _say(f"{out}: trained")


def toyworld(
    out: Folder,
    films: Films = 1,
    shots: Shots = 8,
    transitions: Annotated[bool, typer.Option("--transitions", help="Fades and dissolves beside hard cuts.")] = False,
    titles: Annotated[bool, typer.Option("--titles", help="Cards at the beginning and at the end.")] = False,
    letterbox: Annotated[int, typer.Option(help="Height of the bars above and below, in pixels.", min=0)] = 0,
    seed: Seed = 0,
) -> None:
    """Write films of the toy world, with their ground truth beside them."""
    from cinema.toyworld.film import write_films

    options: dict[str, Any] = {"transitions": transitions, "titles": titles, "letterbox": letterbox}
    _say(f"{out}: {_count(_watch(write_films, films, seed, out, shots=shots, **options), 'film')}")


def evaluate(stories: Stories = 20, shots: Shots = 8, preset: Preset = None, seed: Seed = 0, json: Json = None) -> None:
    """Plan held-out toy stories and read from the pixels whether sets, looks and positions are as captioned."""
    chosen = config.preset(preset)
    from cinema.evaluation import evaluate_stories

    _figures(_watch(evaluate_stories, chosen, stories, shots, seed), json)


def budget(
    pairs: Pairs = "1,8,16,32,48",
    group: Annotated[
        int | None, typer.Option(help="Pairs per GoldenMem level; the preset's if not given.", min=1)
    ] = None,
    levels: Annotated[int | None, typer.Option(help="GoldenMem levels.", min=1)] = None,
    ratio: Annotated[float | None, typer.Option(help="Between the sides of neighbouring levels.")] = None,
    train: Annotated[
        Literal["no", "full", "lora"], typer.Option(help="A step of training: of all, or of adapters.")
    ] = "no",
    recompute: Annotated[bool, typer.Option("--recompute", help="Train with gradient checkpointing.")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="Pairs see earlier ones only; else all see all.")] = False,
    rank: Annotated[int, typer.Option(help="Of the adapters.", min=1)] = 16,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Say what a story of so many keyframes costs, whole and with GoldenMem; nothing is loaded."""
    chosen = config.preset(preset).keyframes
    given: dict[str, Any] = {"memory_group": group, "memory_levels": levels, "memory_ratio": ratio}
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    from cinema.budget import Work, table

    rows = table(chosen, _numbers(pairs), Work(train, recompute, causal, rank))
    shown = [(r.pairs, f"{r.naive_tokens:,}", f"{r.goldenmem_tokens:,}", f"{r.naive_flops / 1e12:,.4g}") for r in rows]
    more = [(f"{r.goldenmem_flops / 1e12:,.4g}", f"{r.peak_bytes / 2**30:,.3g}") for r in rows]
    columns = "pairs", "tokens", "with GoldenMem", "TFLOP", "with GoldenMem", "peak GiB"
    _table(columns, [a + b for a, b in zip(shown, more, strict=True)], rows, json)


def bench_curate(
    folder: Annotated[Path | None, typer.Argument(help="Films with NAME.cuts.csv beside them; else toy films.")] = None,
    detector: Annotated[list[str] | None, typer.Option(help="Compare this one; all if not given.")] = None,
    toy: Annotated[int, typer.Option(help="How many toy films, without a folder.", min=1)] = 6,
    json: Json = None,
) -> None:
    """Compare the detectors of cuts with the truth, and the speed of curation with that of decoding."""
    from cinema import bench

    result = _watch(bench.bench_curate, folder, detector or (), toy)
    speed, found = result["speed"], [(name, t) for name, t in result.items() if isinstance(t, dict) and "f1" in t]
    rows = [(n, f"{t['f1']:.3f}", t["found"], t["wrong"], t["missed"], t["named"], t["gradual"]) for n, t in found]
    columns = "detector", "F1 of hard cuts", "found", "wrong", "missed", "fades and dissolves named", "of"
    _table(columns, rows, result, json)
    for name, figure in result.items():
        _say(f"{name}: {figure}", errors=False) if not isinstance(figure, dict) else None
    costs = [(n, f"{c['cpu seconds']:.2f}", f"{c['peak MiB']:.0f}") for n, c in speed.items() if isinstance(c, dict)]
    _table(("on the largest film", "CPU seconds", "peak MiB"), costs, result, None)
    for name, ratio in speed.items():
        _say(f"{name}: {ratio:.2f}", errors=False) if not isinstance(ratio, dict) else None


def bench_retrieval(
    stories: Annotated[int, typer.Option(help="Flashback stories.", min=1)] = 200,
    frames: Annotated[int, typer.Option(help="Frames to search among, for the time.", min=16)] = 300_000,
    preset: Preset = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare who retrieves the frames that matter, on flashbacks of the toy world; measure the time of a search."""
    from cinema import bench_retrieval as bench

    result = _watch(bench.bench_retrieval, config.preset(preset), stories, seed, frames)
    depths = list(next(iter(result["coverage"].values())))
    rows = []
    for name, told in result["coverage"].items():
        rows.append([name, *(f"{c['mean']:.3f} ({c['ci95'][0]:.3f} to {c['ci95'][1]:.3f})" for c in told.values())])
    _table(("coverage@", *depths), rows, result, json)
    _figures(result["search"], None)


def bench_returns(
    stories: Annotated[int, typer.Option(help="Flashback stories.", min=2)] = 200,
    preset: Preset = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare who is still recognised when a film returns to an early scene, by who chooses what is remembered."""
    from cinema.evaluation import evaluate_returns

    _figures(_watch(evaluate_returns, config.preset(preset), stories, ("recency", "clip", "t5", "oracle"), seed), json)


def bench_planner(
    pairs: Pairs = "8,32,48",
    width: Annotated[int, typer.Option(help="Of the random transformer, a multiple of 64.", min=64)] = 768,
    double: Annotated[int, typer.Option(help="Its double-stream blocks.", min=1)] = 4,
    single: Annotated[int, typer.Option(help="Its single-stream blocks.", min=1)] = 8,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Compare what the next keyframe costs with GoldenMem and a cache, and with all of the past in every step."""
    from cinema import bench_planner as bench

    chosen = config.preset(preset).keyframes
    _figures(_watch(bench.bench_planner, chosen, _numbers(pairs), width, double, single), json)


def doctor(json: Json = None) -> None:
    """Say what this machine can run."""
    _figures({**_machine(), **_weights(), **_services()}, json)


def _machine() -> dict[str, str]:
    facts = {"python": platform.python_version(), "cpu cores": str(_cores()), "memory": f"{_memory() / 2**30:.1f} GiB"}
    try:
        import torch
    except (ImportError, OSError) as error:
        return {**facts, "torch": f"not usable ({error})", "device": "none"}
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        device = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB"
    return {**facts, "torch": torch.__version__, "device": device}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of memory: the machine's, or the container's if that is less; 0 if this is no Unix."""
    total, limit = 0, Path("/sys/fs/cgroup/memory.max")
    with suppress(AttributeError, ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _weights() -> dict[str, str]:
    """Preset -> whether its weights are here, in a folder or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    def here(name: str) -> bool:
        folder = Path(name)
        if folder.is_absolute() or folder.is_dir():
            return (folder / "model_index.json").is_file() and any(folder.glob("transformer/*.safetensors"))
        return isinstance(try_to_load_from_cache(name, "model_index.json"), str)

    facts = {}
    for chosen in map(config.preset, config.PRESETS):
        parts = {"keyframes": chosen.keyframes.weights, "video": chosen.video.weights}
        missing = ", ".join(f"{part} ({where})" for part, where in parts.items() if not here(where))
        facts[f"preset {chosen.name}"] = f"weights missing: {missing}" if missing else "weights present"
    return facts


def _services() -> dict[str, str]:
    import av

    wanted = ("h264", "hevc", "vp9", "av1"), ("libx264", "libx265", "libvpx-vp9", "libsvtav1")
    reads, writes = (", ".join(name for name in names if name in av.codecs_available) or "none" for names in wanted)
    model = os.environ.get("CINEMA_LLM_MODEL", "no CINEMA_LLM_MODEL")  # the address may hold a password: not shown
    endpoint = f"set ({model})" if os.environ.get("CINEMA_LLM_BASE_URL") else "not set; stories are read by rules"
    return {"language model": endpoint, "video codecs": f"reads {reads}; writes {writes}"}


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"pairs are {text!r}; give numbers with commas between them, such as 4,8,12") from None


def _remembering(chosen: config.Preset, retrieval: str | None) -> config.Preset:
    return replace(chosen, keyframes=replace(chosen.keyframes, retrieval=retrieval)) if retrieval else chosen


def _story(path: Path, title: str | None = None, writing: bool = False) -> Story:
    """The story of a file; what was understood of a storyline is the result of writing, else said in passing."""
    if not writing and path.suffix.lower() not in STORYLINE_SUFFIXES:
        return load_story(path)
    from cinema.writer import write_story

    written = write_story(read_text(path, "a storyline in plain English"), title)
    for heading, lines in (("Understood", written.understood), ("Left out", written.left_out)):
        if lines:
            _say("\n  ".join([f"{heading}:", *lines]), errors=not writing)
    return written.story


def _figures(result: Any, path: Path | None) -> None:
    """Show figures as a table, nested ones by dotted names, and save them."""

    def flat(figures: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in figures.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{above}{name}.")
            else:
                yield f"{above}{name}", f"{value:.4g}" if isinstance(value, float) else value

    _table(("what", "value"), flat(to_jsonable_python(result, fallback=str)), result, path)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], result: Any, path: Path | None) -> None:
    """Show rows, and save the result that they tell as JSON."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # captions and file names are data: never read as markup
    Console().print(table)
    if path:
        write_json(path, to_jsonable_python(result, fallback=str))


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _say(message: str, errors: bool = True) -> None:
    Console(stderr=errors, highlight=False).print(message, markup=False, soft_wrap=True)


def _watch(work: Callable[..., Result], *given: Any, **options: Any) -> Result:
    """Do a piece of work while a progress bar on standard error shows the (done, total, message) that it tells."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(*columns, text, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(done: int, total: int, message: str) -> None:
            bar.update(task, completed=done, total=total, description=message)

        return work(*given, **options, on_progress=tell)


# fmt: off
_COMMANDS: dict[Callable[..., None], str] = {  # command -> the module it needs
    write: "cinema.writer", movie: "cinema.movie", plan: "cinema.movie", animate: "cinema.movie",
    curate: "cinema.curation", train: "cinema.training", toyworld: "cinema.toyworld.film",
    evaluate: "cinema.evaluation", budget: "cinema.budget", doctor: "cinema.config",
}
# fmt: on


def make_app() -> typer.Typer:
    """The program with the commands whose modules are there."""
    app = typer.Typer(name="cinema", add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_about)
    for command, module in _COMMANDS.items():
        spec = find_spec(module)
        if spec and spec.origin:  # a folder without code has no origin
            app.command()(command)
    bench = typer.Typer(help="Measure how good and how fast a part is.")
    bench.command("curate")(bench_curate)
    bench.command("retrieval")(bench_retrieval)
    bench.command("returns")(bench_returns)
    bench.command("planner")(bench_planner)
    app.add_typer(bench, name="bench")
    return app


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"cinema {importlib.metadata.version('cinema')}")
        raise typer.Exit
    return wanted


def _about(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """From a storyline to a short movie."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code (see the module's text). `arguments` default to the command line's."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = make_app()(given, prog_name="cinema", standalone_mode=False) or 0
    except TyperException as error:
        context = getattr(error, "ctx", None)
        told = error.format_message().replace("Value error, ", "").rstrip(".")
        command = context.command_path if context else "cinema"
        return _fail(f"{told}; `{command} --help` shows what there is", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if os.environ.get("CINEMA_DEBUG"):
            raise
        if isinstance(error, UserError):
            return _fail(str(error))
        if isinstance(error, OSError) and (why := error.strerror):
            where = error.filename2 or error.filename or "file"
            return _fail(f"{where}: {why.lower()}; free or choose another place")
        return _fail(f"{type(error).__name__}: {error}; set CINEMA_DEBUG=1 to see where it comes from")
    return _fail("stopped; the same command goes on from here") if code == 130 else int(code)


def _fail(message: str, code: int = 1) -> int:
    _say(" ".join(message.split()))
    return code


if __name__ == "__main__":
    sys.exit(main())
