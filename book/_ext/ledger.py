"""What was measured: results in `book/results`, tables and numbers of pages made from them, and the claims ledger.

`book/ledger.yaml` says which command makes each result and how each claim of the paper is judged by it. A page shows a
result by the directive `{results}`, a number by the role `{measured}`, all claims by `{ledger}`. As a script (`make
ledger`) this module measures what is missing or was measured with other weights.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.typing import OptionSpec

from cinema.config import preset
from cinema.movie import weights_identity

BOOK = Path(__file__).parents[1]
RESULTS, CLAIMS = BOOK / "results", BOOK / "ledger.yaml"
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch")
FIGURES = {"identity": "identity", "psnr": "PSNR, dB"}  # of ablations, each with what it is above the first row's
BADGES = {"holds": "success", "proved": "success", "does not hold": "danger", "not shown": "warning"}


class Measured(NamedTuple):
    """A figure and its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, form: str = ".2f") -> str:
        """As pages show it, such as `0.77 (0.67–0.86)`; the figure alone where all three are the same."""
        shown = [format(value, form) for value in self]
        return shown[0] if len({*shown}) == 1 else f"{shown[0]} ({shown[1]}–{shown[2]})"


@cache
def settings() -> dict[str, Any]:
    """The file `book/ledger.yaml`: `results` by name, and `claims`."""
    return yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))


@cache
def result(name: str) -> dict[str, Any]:
    """A result with its `command`, `weights`, `versions`, `seconds` and `figures`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def weights(name: str) -> dict[str, str]:
    """Identities of the toy weights that a result hangs on, by part."""
    toy, uses = preset("toy"), settings()["results"][name].get("uses", ["keyframes", "towers"])
    folders = {"keyframes": toy.keyframes.weights, "towers": toy.keyframes.towers, "video": toy.video.weights}
    return {part: weights_identity(folders[part]) for part in uses}


def look_up(path: str) -> Any:
    """What stands in a result, by `NAME/key/key`; a row of a list is named by its `pairs` and `memory`."""
    name, *keys = path.split("/")
    found = result(name)["figures"]
    for key in keys:
        if isinstance(found, list):
            found = {" ".join(str(row[k]) for k in ("pairs", "memory") if k in row): row for row in found}
        found = found[key]
    return found


def measured(path: str) -> Measured:
    """A figure with its interval, which stands in it or beside it; `…/gain` is what it is above the first row's."""
    if path.endswith("/gain"):
        low, high = look_up(path.removesuffix("/gain"))["gain ci95"]
        return Measured((low + high) / 2, low, high)
    found = look_up(path)
    if isinstance(found, dict):
        return Measured(found["mean"], *found["ci95"])
    parent, _, key = path.rpartition("/")
    beside = look_up(parent) if "/" in parent or parent else {}
    interval = (beside.get("ci95") or {}).get(key) if isinstance(beside, dict) else None
    return Measured(found, *(interval or (found, found)))


def compared(claim: Mapping[str, Any]) -> Measured:
    """What a claim is judged by: a figure (`of`), or two as `ratio` or `difference`, each at the worst ends."""
    if "of" in claim:
        return measured(claim["of"])
    a, b = map(measured, claim.get("ratio") or claim["difference"])
    if "ratio" in claim:
        return Measured(a.mean / b.mean, a.low / b.high, a.high / b.low)
    return Measured(a.mean - b.mean, a.low - b.high, a.high - b.low)


def verdict(claim: Mapping[str, Any]) -> str:
    """Holds, does not hold, or is not shown, when the interval has the bound in it; `proved` names a test."""
    if "untested" in claim:
        return "cannot be tested here"
    if "proved" in claim:
        return "proved"
    if "equals" in claim:
        path, values = claim["equals"]
        name, key = path.split("/")
        return "holds" if [row[key] for row in result(name)["figures"]] == values else "does not hold"
    _, low, high = compared(claim)
    holds, fails = (
        (low > claim["above"], high <= claim["above"])
        if "above" in claim
        else (high < claim["below"], low >= claim["below"])
    )
    return "holds" if holds else "does not hold" if fails else "not shown"


def fill(text: str) -> str:
    """A text with `[path]` or `[path:form]` exchanged for what was measured."""
    parts = text.split("[")
    filled = [parts[0]]
    for part in parts[1:]:
        path, _, rest = part.partition("]")
        name, _, form = path.partition(":")
        filled.append(measured(name).text(form or ".2f") + rest)
    return "".join(filled)


def used(claim: Mapping[str, Any]) -> list[str]:
    """Names of the results that a claim is judged by."""
    paths = [claim.get("of"), *(claim.get("ratio") or claim.get("difference") or ()), *claim.get("equals", [])[:1]]
    return list(dict.fromkeys(path.split("/")[0] for path in paths if path))


def ledger_row(claim: Mapping[str, Any]) -> str:
    """A row of the ledger, in Markdown."""
    judged = verdict(claim)
    badge = f"{{bdg-{BADGES.get(judged, 'secondary')}}}`{judged}`"
    how = [f"`cinema {settings()['results'][name]['command']}`" for name in used(claim)]
    how += [f"`{claim['proved']}`"] if "proved" in claim else []
    ours = " ".join([fill(claim.get("ours", "")), claim.get("untested", "")]).strip()
    return f"| {claim['claim']} ({claim['source']}) | {claim['paper']} | {ours} | {badge} | {'<br>'.join(how)} |"


def ablation_table(name: str, first: str, columns: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """The rows of an ablation as a Markdown table: `columns` of its facts and figures, after the row's label."""
    heads = [first, *(head for c in columns for head in ([FIGURES[c], "above the first"] if c in FIGURES else [c]))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for i, (label, row) in enumerate(look_up(f"{name}/rows").items()):
        cells = [labels.get(label, label)]
        for column in columns:
            if column not in FIGURES:
                cells.append(", ".join(map(str, row[column])) if isinstance(row[column], list) else str(row[column]))
                continue
            form = ".1f" if column == "psnr" else ".2f"
            cells.append(measured(f"{name}/rows/{label}/{column}").text(form))
            signed = [f"{value:+.2f}".replace("-", "−") for value in row[column]["gain ci95"]]
            cells.append(" to ".join(signed) if i else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class _Generated(SphinxDirective):
    """A directive that writes Markdown for the page it stands on."""

    def generate(self, lines: Sequence[str], names: Sequence[str]) -> list[nodes.Node]:
        for path in [CLAIMS, *(RESULTS / f"{name}.json" for name in names)]:
            self.env.note_dependency(str(path))
        holder = nodes.Element()
        self.state.nested_parse(StringList([*lines], source=""), self.content_offset, holder)
        return holder.children


class Results(_Generated):
    """The table of an ablation: its `:columns:`, the head of the `:first:` one, `:labels:` as old=new; a caption."""

    required_arguments, has_content = 1, True
    option_spec: OptionSpec = {  # noqa: RUF012
        key: directives.unchanged_required for key in ("name", "first", "columns", "labels")
    }

    def run(self) -> list[nodes.Node]:
        """A numbered table with the command that made it; an error if there is no such result."""
        name, of = self.arguments[0], self.options
        if not (RESULTS / f"{name}.json").is_file():
            raise self.error(f"results: there is no result {name}; run make ledger")
        labels = dict(pair.split("=") for pair in of.get("labels", "").split(", ") if pair)
        rows = ablation_table(name, of["first"], of["columns"].split(), labels)
        source = f"Source: `cinema {settings()['results'][name]['command']}`, preset `toy`."
        caption = " ".join([*self.content, source])
        return self.generate([f"~~~{{table}} {caption}", f":name: {of['name']}", "", *rows, "~~~"], [name])


class Ledger(_Generated):
    """The claims of one `{ledger} GROUP`, each with what was measured and the verdict."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A table, a claim each row; an error if there is no such group."""
        claims = [claim for claim in settings()["claims"] if claim["group"] == self.arguments[0]]
        if not claims:
            raise self.error(f"ledger: there is no claim of group {self.arguments[0]}")
        head = ["| claim | the paper | ours, at toy size | verdict | how |", "|---|---|---|---|---|"]
        names = [name for claim in claims for name in used(claim)]
        return self.generate([*head, *map(ledger_row, claims)], names)


class MeasuredRole(SphinxRole):
    """A number of a result in running text: `PATH` or `PATH:form`, `PATH:ci` with its interval."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Its text; a warning if there is no such figure."""
        path, _, form = self.text.partition(":")
        self.env.note_dependency(str(RESULTS / f"{path.split('/')[0]}.json"))
        try:
            figure = measured(path)
        except (KeyError, OSError):
            message = self.inliner.reporter.warning(f"measured: there is no figure {path}; see book/results")
            return [], [message]
        return [nodes.Text(figure.text() if form == "ci" else format(figure.mean, form or ".2f"))], []


def wrap(name: str, command: str, figures: Any, seconds: float | None) -> dict[str, Any]:
    """A result as it is kept: figures, and what they were made with."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    told = {"command": command, "weights": weights(name), "versions": versions, "seconds": seconds}
    return told | {"figures": figures}


def fresh(name: str, folder: Path) -> bool:
    """Whether a result is there and was made by the command and the weights of now."""
    try:
        kept = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return kept["weights"] == weights(name) and kept["command"].startswith(settings()["results"][name]["command"])


def measure(name: str, folder: Path, small: bool = False) -> None:
    """Run a result's command and keep what it gives; what an interrupted run has done is not done again."""
    of, work = settings()["results"][name], folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    command = f"{of['command']} {of.get('small', '')}".strip() if small else of["command"]
    kept = ["--out", str(work / name)] if command.startswith("bench ablate") else []
    path, begun = work / f"{name}.json", time.monotonic()
    subprocess.run([sys.executable, "-m", "cinema.cli", *shlex.split(command), *kept, "--json", str(path)], check=True)
    wrapped = wrap(name, command, json.loads(path.read_text()), round(time.monotonic() - begun))
    (folder / f"{name}.json").write_text(json.dumps(wrapped, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing; `--small` measures little of everything, into a folder of the build."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="which results; else all that are missing or old")
    parser.add_argument("--small", action="store_true", help="two stories each, to see that everything runs")
    given = parser.parse_args()
    folder = BOOK.parent / "_build" / "ledger" if given.small else RESULTS
    names = given.names or [name for name in settings()["results"] if not fresh(name, folder)]
    if unknown := {*names} - {*settings()["results"]}:
        parser.error(f"there is no result {min(unknown)}; choose of {', '.join(settings()['results'])}")
    for name in names:
        print(f"{name}: cinema {settings()['results'][name]['command']}", flush=True)
        measure(name, folder, given.small)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and the role."""
    app.add_directive("results", Results)
    app.add_directive("ledger", Ledger)
    app.add_role("measured", MeasuredRole())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    main()
