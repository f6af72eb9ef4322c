"""The command line; what is heavy is imported when a command asks for it.

Results go to standard output, the rest to standard error. Exit codes: 0 done, 1 the user can mend it (one sentence;
CINEMA_DEBUG=1 shows where), 2 wrong usage, 3 some films could not be curated; `verify` has its own."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from typer.exceptions import TyperException

from cinema import config
from cinema.errors import UserError
from cinema.files import writable, write_json
from cinema.story import Story, load_cast, load_story, read_text, save_story

DETECTOR_HELP = "What finds the cuts: planes, content, adaptive, or transnetv2."
app = typer.Typer(help="From a storyline to a short movie.", add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(help="Measure how good and how fast a part is.")
study = typer.Typer(help="Ask people which films are better.")


def _numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise typer.BadParameter(f"{min(numbers)} pairs cannot be; give numbers from 1 on, such as 4,8,12")
    return numbers


# A callback or parser makes of what is typed what the command gets: `Any` is then a preset, and numbers.
Preset = Annotated[
    Any, typer.Option(metavar="<str>", help="toy, small or flux; else CINEMA_PRESET, or toy.", callback=config.preset)
]
Pairs = Annotated[Any, typer.Option(metavar="<str>", help="Numbers of pairs, such as 4,8,12.", parser=_numbers)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", callback=writable)]
Seed = Annotated[int, typer.Option(help="Another seed, another result; the same seed, the same.", min=0)]
StoryFile = Annotated[Path, typer.Argument(help="A story in YAML, or a storyline in plain English (.txt).")]
FilmFile = Annotated[Path, typer.Option("--out", "-o", help="The film to write: .mp4 (H.264) or .webm (VP9).")]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")]
Unmarked = Annotated[bool, typer.Option("--unmarked", help="Without watermark and credentials.")]
Shots = Annotated[int, typer.Option(help="Shots a story.", min=1, max=500)]
Width = Annotated[int, typer.Option(help="Of the random transformer, a multiple of 64.", min=64)]
Double = Annotated[int, typer.Option(help="Its double-stream blocks.", min=1)]
Single = Annotated[int, typer.Option(help="Its single-stream blocks.", min=1)]


@app.command()
def write(
    storyline: Annotated[Path, typer.Argument(help="A text file: what happens, in plain English.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The story to write, .yaml.")],
) -> None:
    """Turn a storyline in plain English into a story, and say what was understood."""
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"{out}: a story is written as YAML; give a name that ends in .yaml")
    story = _write(storyline, errors=False)
    save_story(story, out)
    _say(f"{out}: shots {len(story.shots)}, characters {len(story.cast)}, sets {len(story.sets)}")


@app.command()
def movie(story: StoryFile, out: FilmFile, preset: Preset = None, seed: Seed = 0, unmarked: Unmarked = False) -> None:
    """Make a film from a story: plan its keyframes, animate its shots, join them."""
    made = _watch("cinema.movie:make_movie", _story(story), out, preset, seed, marked=not unmarked)
    _say(f"{out}: {len(made.keyframes)} shots")


@app.command()
def plan(
    story: StoryFile,
    out: Folder,
    preset: Preset = None,
    retrieval: Annotated[
        str | None, typer.Option(help="Who chooses what is remembered: recency, clip, t5, random or oracle.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Keyframes that are drawn together.", min=1)] = None,
    mask: Annotated[
        Literal["full", "causal"] | None, typer.Option(help="Who sees whom: full, or causal, each the earlier ones.")
    ] = None,
    edit: Annotated[bool, typer.Option("--edit", help="The story was edited: plan again what depends on it.")] = False,
    seed: Seed = 0,
    unmarked: Unmarked = False,
) -> None:
    """Plan a story's keyframes: a storyboard in a folder, which `cinema animate` turns into a film."""
    chosen = preset.remembering(retrieval=retrieval, window=window, mask=mask)
    board = _watch("cinema.movie:plan_storyboard", _story(story), out, chosen, seed, edited=edit, marked=not unmarked)
    _say(f"{out}: {len(board.keyframes)} keyframes")


@app.command()
def animate(
    storyboard: Annotated[Path, typer.Argument(help="A folder that `cinema plan` wrote.")],
    out: FilmFile,
    preset: Preset = None,
    seed: Seed = 0,
    again: Annotated[list[int] | None, typer.Option(help="A shot of the film to draw anew, from 1 on.", min=1)] = None,
    take: Annotated[int, typer.Option(help="Of what is drawn again: another take, another shot.", min=1)] = 1,
    unmarked: Unmarked = False,
) -> None:
    """Make a film from a planned storyboard; of one that is made, draw some shots again and leave the others."""
    anew = [shot - 1 for shot in again or ()]
    options: dict[str, Any] = {"again": anew, "take": take, "marked": not unmarked}
    _watch("cinema.movie:animate_storyboard", storyboard, out, preset, seed, **options)
    _say(f"{out}: written")


@app.command()
def curate(
    films: Annotated[list[str], typer.Argument(metavar="FILM_OR_FOLDER...", help="Films, or folders with films.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write into; s3://... and the like work too.")],
    annotator: Annotated[
        Literal["truth", "vision", "local", "none"], typer.Option(help="Who writes captions.")
    ] = "none",
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the local annotator's model.")] = None,
    cast: Annotated[Path | None, typer.Option(help="YAML whose `cast` captions may name.")] = None,
    detector: Annotated[str, typer.Option(help=DETECTOR_HELP)] = "planes",
    video: Annotated[bool, typer.Option("--video", help="Also write the shots as videos, OUT/clips.")] = False,
    workers: Annotated[int | None, typer.Option(help="Films at a time; all cores if not given.", min=1)] = None,
    max_requests: Annotated[int | None, typer.Option(help="Requests for captions it may send.", min=0)] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Spread films over a Ray cluster.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Also write pages to look through, OUT/report.")] = False,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Turn films into shots, keyframes and captions on disk; what is broken is reported and skipped."""
    people = load_cast(cast) if cast else []
    from cinema import curation

    makers: dict[str, Callable[[], curation.Annotator]] = {
        "truth": curation.GroundTruthAnnotator,
        "vision": lambda: curation.VisionAnnotator(people),
        "local": lambda: curation.LocalAnnotator(model, people),
        "none": curation.NoAnnotator,
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or (1 if annotator == "local" else cores)
    options: dict[str, Any] = {"height": preset.keyframes.height, "detector": detector, "video": video, "ray": ray}
    options |= {"max_requests": max_requests, "workers": workers}
    found = curation.find_films(films, out)
    stopped = None
    try:
        result = _watch("cinema.curation:curate", found, out, annotator=makers[annotator](), **options)
    except curation.StoppedError as error:
        if not (result := error.report):
            raise
        stopped = error
    columns = "status", "shots", "kept", "reason"
    _show(result, json, {curation.shown(str(f.film)): {c: getattr(f, c) for c in columns} for f in result.films})
    if report and any(f.status != "waiting" for f in result.films):
        _say(f"{curation.write_report(out)}: open it in a browser")
    if stopped:
        raise stopped
    if result.failed:
        _say(f"{len(result.failed)} of {len(result.films)} films could not be curated; the table says why")
        raise typer.Exit(3)


@app.command()
def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Pictures and films.")],
    trust: Annotated[list[Path] | None, typer.Option(help="Certificates in PEM, of signers to trust.")] = None,
) -> None:
    """Say whether pictures and films have our watermark and valid credentials, a line of JSON each.

    Exit codes: 0 all have the watermark, 1 some have not, 2 some cannot be read.
    """
    from cinema.provenance import verify

    codes = []
    for file in files:
        try:
            told = to_jsonable_python(verify(file, trust or ()))
            codes.append(0 if told["watermark"] else 1)
        except UserError as error:
            told = {"watermark": False, "false_positive_probability": 1.0, "payload": None, "credentials": "absent"}
            told |= {"file": str(file), "error": str(error)}
            codes.append(2)
            _say(str(error))
        print(dumps(told))
    raise typer.Exit(max(codes))


@app.command()
def train(
    settings: Annotated[Path, typer.Argument(metavar="CONFIG", help="A training configuration in YAML.")],
    out: Folder,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    base: Annotated[str | None, typer.Option(help="Folder or hub name of the weights to start from.")] = None,
) -> None:
    """Train a model; a run that was stopped goes on with --resume and ends as if it never had been."""
    _watch("cinema.training:train", settings, out, resume, base)
    _say(f"{out}: trained")


@app.command()
def toyworld(
    out: Folder,
    films: Annotated[int, typer.Option(help="How many films.", min=1)] = 1,
    shots: Shots = 8,
    transitions: Annotated[bool, typer.Option("--transitions", help="Fades and dissolves beside hard cuts.")] = False,
    titles: Annotated[bool, typer.Option("--titles", help="Cards at the beginning and at the end.")] = False,
    letterbox: Annotated[int, typer.Option(help="Height of the bars above and below, in pixels.", min=0)] = 0,
    seed: Seed = 0,
) -> None:
    """Write films of the toy world, with their ground truth beside them."""
    options: dict[str, Any] = {"shots": shots, "transitions": transitions, "titles": titles, "letterbox": letterbox}
    _say(f"{out}: {len(_watch('cinema.toyworld.film:write_films', films, seed, out, **options))} films")


@app.command()
def evaluate(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STORYBOARD_OR_FILM... | stress]", help="What to score; else held-out toy stories."),
    ] = None,
    stories: Annotated[int, typer.Option(help="How many held-out stories.", min=1)] = 20,
    shots: Shots = 8,
    pairs: Pairs = "8,16,24,32,48",
    looks: Annotated[
        Literal["train", "unseen", "all"], typer.Option(help="Seen in training, held out, or any.")
    ] = "train",
    given: Annotated[int, typer.Option(help="First shots that are shown, and not described.", min=0)] = 0,
    embedder: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="From pictures to vectors that tell characters apart.")
    ] = None,
    judge: Annotated[
        Literal["vision", "truth"] | None, typer.Option(help="Also six aspects by a vision model, or by the truth.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a page with the figures and frames of films.")] = None,
    vbench: Annotated[Path | None, typer.Option(help="Folder for films as VBench reads them.")] = None,
    against: Annotated[Path | None, typer.Option(help="Earlier figures (JSON): fail if one has fallen.")] = None,
    preset: Preset = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Score films and storyboards; or held-out toy stories, which it plans; for `stress`, longer and longer ones."""
    from cinema import evaluation

    before = evaluation.read_figures(against) if against else {}
    if what == ["stress"]:
        figures = _watch("cinema.evaluation:stress", preset, pairs, stories, seed, json)
        shown = {
            f"{row['pairs']} pairs, {row['memory']}": {key: row[key] for key in evaluation.STRESSED} for row in figures
        }
    elif what:
        made = evaluation.load_embedder(embedder) if embedder else None
        films, extras = [Path(name) for name in what], {"judge": judge, "report": report, "vbench": vbench}
        figures = _watch("cinema.evaluation:evaluate_films", films, preset, made, **extras)
        shown = {name: {"value": value, "ci95": figures["ci95"][name]} for name, value in figures["mean"].items()}
    else:
        shown = figures = _watch("cinema.evaluation:evaluate_stories", preset, stories, shots, seed, looks, given)
    _show(figures, json, shown)
    if worse := evaluation.fallen(figures, before):
        raise UserError(f"{against}: {len(worse)} of its figures have fallen ({'; '.join(worse)}); find out why")


@app.command()
def budget(
    pairs: Pairs = "1,8,16,32,48",
    group: Annotated[int | None, typer.Option(help="Pairs per GoldenMem level; else the preset's.", min=1)] = None,
    levels: Annotated[int | None, typer.Option(help="GoldenMem levels.", min=1)] = None,
    ratio: Annotated[float | None, typer.Option(help="Between the sides of neighbouring levels.")] = None,
    train: Annotated[Literal["no", "full", "lora"], typer.Option(help="Train all of it, or adapters.")] = "no",
    recompute: Annotated[bool, typer.Option("--recompute", help="Train with gradient checkpointing.")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="Pairs see earlier ones only; else all see all.")] = False,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Say what a story of so many keyframes costs, whole and with GoldenMem; nothing is loaded."""
    from cinema.budget import Work, table

    chosen = preset.remembering(memory_group=group, memory_levels=levels, memory_ratio=ratio).keyframes
    rows, told = table(chosen, pairs, Work(train, recompute, causal)), dict[str, Any]()
    for row in rows:
        costs = {"tokens": row.naive_tokens, "with GoldenMem": row.goldenmem_tokens, "TFLOP": row.naive_flops / 1e12}
        costs |= {"TFLOP with GoldenMem": row.goldenmem_flops / 1e12, "peak GiB": row.peak_bytes / 2**30}
        told[f"pairs: {row.pairs}"] = costs
    _show(rows, json, told)


@study.command("write")
def study_write(
    runs: Annotated[list[Path], typer.Argument(help="Folders of films with the same names.")],
    out: Folder,
    seed: Seed = 0,
) -> None:
    """Write a page on which people compare the films of two or more runs without knowing which is which."""
    page = resolve_name("cinema.evaluation.study:write_study")(runs, out, seed)
    _say(f"{page}: open it in a browser; {out}.key.json says which film is whose, so keep it from raters")


@study.command("read")
def study_read(
    key: Annotated[Path, typer.Argument(help="The key that `cinema study write` wrote.")],
    answers: Annotated[list[Path], typer.Argument(help="The raters' CSV files.")],
    json: Json = None,
) -> None:
    """Give means, intervals and agreement of what people answered."""
    figures = resolve_name("cinema.evaluation.study:read_study")(key, answers)
    _show(figures, json, figures["runs"] | {"agreement": figures["agreement"]})


@bench.command("curate")
def bench_curate(
    folder: Annotated[Path, typer.Argument(help="Films with NAME.cuts.csv or the toy world's NAME.json beside them.")],
    json: Json = None,
) -> None:
    """Compare the detectors of cuts with the truth, and the speed of curation with that of decoding."""
    _show(_watch("cinema.bench:bench_curate", folder), json)


@bench.command("retrieval")
def bench_retrieval(
    stories: Annotated[int, typer.Option(help="Flashback stories.", min=1)] = 200,
    frames: Annotated[int, typer.Option(help="Frames to search among, for the time.", min=16)] = 300_000,
    preset: Preset = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare who retrieves the frames that matter, on flashbacks of the toy world; measure the time of a search."""
    _show(_watch("cinema.bench_planner:bench_retrieval", preset, stories, seed, frames), json)


@bench.command("ablate")
def bench_ablate(
    name: Annotated[
        str, typer.Argument(help="What is changed, such as retrieval, levels or stages; a wrong one lists all.")
    ],
    stories: Annotated[int, typer.Option(help="Films of each seed.", min=2)] = 50,
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 2,
    tune: Annotated[int, typer.Option(help="Steps of training, for rows that differ in it.", min=1)] = 200,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep what is done here, and go on from it.")] = None,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Change one thing of the memory at a time, and read who is still recognised when a film returns to a scene."""
    _show(_watch("cinema.ablation:ablate", preset, name, stories, range(seeds), out, tune), json)


@bench.command("planner")
def bench_planner(
    pairs: Pairs = "8,32,48",
    width: Width = 768,
    double: Double = 4,
    single: Single = 8,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Compare what the next keyframe costs with GoldenMem and a cache, and without either."""
    _show(_watch("cinema.bench_planner:bench_planner", preset.keyframes, pairs, (width, double, single)), json)


@bench.command("training")
def bench_training(
    pairs: Pairs = "8,16,32",
    width: Width = 768,
    double: Double = 4,
    single: Single = 8,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Compare a step of training by folds, with GoldenMem and without, and by dense masks."""
    _show(_watch("cinema.bench_planner:bench_training", preset.keyframes, pairs, (width, double, single)), json)


@bench.command("train")
def bench_train(
    pairs: Pairs = "8",
    width: Width = 768,
    double: Double = 4,
    single: Single = 8,
    steps: Annotated[int, typer.Option(help="Steps that are measured.", min=1)] = 5,
    batch: Annotated[int, typer.Option(help="Windows a step.", min=1)] = 1,
    lora: Annotated[int | None, typer.Option(help="Rank of adapters; without it all is trained.", min=1)] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Gradient checkpointing.")] = False,
    preset: Preset = None,
    json: Json = None,
) -> None:
    """Measure steps of training as they are done: time, pairs a second, share of the machine's peak."""
    told = preset, pairs, (width, double, single), steps, batch, lora, recompute
    _show(_watch("cinema.bench_planner:bench_train", *told), json)


@app.command()
def doctor(json: Json = None) -> None:
    """Say what this machine can run."""
    import av
    import torch
    from huggingface_hub import try_to_load_from_cache

    def here(name: str) -> bool:
        if Path(name).is_absolute() or Path(name).is_dir():
            return any(Path(name).glob("transformer/*.safetensors"))
        return isinstance(try_to_load_from_cache(name, "model_index.json"), str)

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    device = ", ".join(f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards)
    facts = {"python": platform.python_version(), "torch": torch.__version__, "cpu cores": str(os.cpu_count())}
    facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    facts["device"] = device or ("mps" if torch.backends.mps.is_available() else "cpu")
    for chosen in map(config.preset, config.PRESETS):
        parts = {"keyframes": chosen.keyframes.weights, "video": chosen.video.weights}
        missing = ", ".join(f"{part} ({where})" for part, where in parts.items() if not here(where))
        facts[f"preset {chosen.name}"] = f"weights missing: {missing}" if missing else "weights present"
    model = os.environ.get("CINEMA_LLM_MODEL", "no CINEMA_LLM_MODEL")  # the address may hold a password: not shown
    endpoint = f"set ({model})" if os.environ.get("CINEMA_LLM_BASE_URL") else "not set; stories are read by rules"
    codecs = {"h264", "hevc", "vp9", "av1", "libx264", "libx265", "libvpx-vp9", "libsvtav1"} & av.codecs_available
    _show(facts | {"language model": endpoint, "video codecs": ", ".join(sorted(codecs))}, json)


def _story(path: Path) -> Story:
    from cinema.policy import concerns

    story = _write(path) if path.suffix.lower() == ".txt" else load_story(path)
    for concern in concerns(story):
        _say(f"{path}: {concern}")
    return story


def _write(storyline: Path, errors: bool = True) -> Story:
    """The story of a storyline; says what was understood of it."""
    from cinema.writer import write_story

    written = write_story(read_text(storyline, "a storyline in plain English"))
    for heading, lines in (("Understood", written.understood), ("Left out", written.left_out)):
        if lines:
            _say("\n  ".join([f"{heading}:", *lines]), errors)
    return written.story


def _show(result: Any, path: Path | None, told: Mapping[str, Any] | None = None) -> None:
    """Save a result as JSON, and show it as tables, or else what is `told` of it."""
    figures = to_jsonable_python(result, fallback=str)
    if path:
        write_json(path, figures)
    _tables(told or figures)


def _tables(figures: Mapping[str, Any], name: str = "what") -> None:
    """Show parts that have the same names as rows of one table, and what has no parts as rows of another."""
    alike: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, value in figures.items():
        alike.setdefault(tuple(value) if isinstance(value, Mapping) else (), {})[key] = value
    for columns, rows in alike.items():
        if columns and len(rows) == 1:
            for key, value in rows.items():
                _tables(value, key)
            continue
        # Captions and file names are data: never read as markup.
        heads = (Column(Text(column), overflow="fold") for column in (name, *(columns or ("value",))))
        table = Table(*heads)
        table.columns[0].min_width = min(24, max(map(len, rows)))
        for key, value in rows.items():
            table.add_row(*(Text(_cell(cell)) for cell in (key, *(value.values() if columns else [value]))))
        Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):  # such as a mean and its interval
        return " ".join(map(_cell, value.values()))
    if isinstance(value, list):
        return f"[{', '.join(map(_cell, value))}]"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _say(message: str, errors: bool = True) -> None:
    Console(stderr=errors, highlight=False).print(message, markup=False, soft_wrap=True)


def _watch(work: str, *given: Any, **options: Any) -> Any:
    """Call "module:function" while a progress bar on standard error shows the (done, total, message) that it tells."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(*columns, text, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(done: int, total: int, message: str) -> None:
            bar.update(task, completed=done, total=total, description=message)

        return resolve_name(work)(*given, **options, on_progress=tell)


app.add_typer(bench, name="bench")
app.add_typer(study, name="study")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code (see the module's text). `arguments` default to the command line's."""
    given, code = list(sys.argv[1:] if arguments is None else arguments) or ["--help"], 1
    try:
        if (ended := app(given, prog_name="cinema", standalone_mode=False) or 0) != 130:
            return ended
        told = "stopped; the same command goes on from here"
    except TyperException as error:
        context, code = getattr(error, "ctx", None), error.exit_code
        told = error.format_message().replace("Value error, ", "").rstrip(".")
        told += f"; `{context.command_path if context else 'cinema'} --help` shows what there is"
    except Exception as error:
        if os.environ.get("CINEMA_DEBUG"):
            raise
        told = f"{type(error).__name__}: {error}; set CINEMA_DEBUG=1 to see where it comes from"
        if isinstance(error, UserError):
            told = str(error)
        elif isinstance(error, OSError) and error.strerror:
            told = f"{error.filename2 or error.filename or 'file'}: {error.strerror}; free or choose another place"
    _say(" ".join(told.split()))
    return code


if __name__ == "__main__":
    sys.exit(main())
