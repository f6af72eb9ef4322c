"""A user study: a page that shows films of two or more runs side by side, blinded, and what came of it.

The rating is the paper's, from Very Poor to Very Good, for quality and for how well a film tells its captions.
"""

import csv
import hashlib
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from cinema.curation.report import write_page
from cinema.errors import UserError
from cinema.evaluation.film import read_film
from cinema.evaluation.stories import bootstrap, share
from cinema.files import write_json

SCALE = ("Very Poor", "Poor", "Good", "Very Good")  # 1 to 4
ASKED = {"quality": "How good does the film look?", "alignment": "How well does it tell the captions?"}


def write_study(runs: Sequence[Path], out: Path, seed: int = 0) -> Path:
    """Write `out`/index.html, which asks about every two runs' films of one story; and beside `out` its `.key.json`.

    Runs are folders of films with the same names. Films are copied under names that do not tell the run; order and
    sides are shuffled by the seed; the key says which is which, and raters do not get it. UserError if there are less
    than two runs, or they share no film.
    """
    names = sorted(set.intersection(*({path.name for path in run.glob("*.mp4")} for run in runs)) if runs else [])
    if len(runs) < 2 or not names:
        have = f"{len(runs)} runs have {len(names)} films in common"
        raise UserError(f"{have}; give two folders or more with films of the same names")
    rng, key, items = random.Random(seed), dict[str, dict[str, str]](), list[dict[str, Any]]()
    for name in names:
        lines, blind = [shot.caption for shot in read_film(runs[0] / name).story.shots], dict[Path, str]()
        for run in runs:
            digest = hashlib.blake2b(f"{seed}/{run}/{name}".encode(), digest_size=6).hexdigest()
            blind[run], key[digest] = digest, {"run": run.name, "film": name}
            (out / "films").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, out / "films" / f"{digest}.mp4")
        items += [{"films": rng.sample([blind[a], blind[b]], 2), "captions": lines} for a, b in combinations(runs, 2)]
    rng.shuffle(items)
    write_json(out.with_name(f"{out.name}.key.json"), key)
    write_page(out / "index.html", "study.html", title="Which film?", items=items, asked=ASKED, scale=SCALE)
    return out / "index.html"


def read_study(key: Path, answers: Sequence[Path]) -> dict[str, Any]:
    """What raters said: by run and question the mean (1 to 4), its 95 % interval over stories, the number of ratings.

    Also `agreement`, Krippendorff's alpha: 1 for raters of one mind, 0 for chance. `answers` are the CSV files that
    the page exports, one of each rater. UserError if one of them cannot be read or is of another study.
    """
    try:
        films = json.loads(key.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: no key of a study ({error}); give the one that was written beside it") from None
    rated: dict[str, dict[tuple[str, str], list[float]]] = {question: defaultdict(list) for question in ASKED}
    for path in answers:
        try:
            for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
                film = films[row["film"]]
                for question, points in rated.items():
                    points[film["run"], film["film"]].append(1.0 + [*map(str, range(1, 5))].index(row[question]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: not the answers to this study ({error!r}); leave it away") from None
    told: dict[str, Any] = {"raters": len(answers), "runs": {}}
    for run in dict.fromkeys(film["run"] for film in films.values()):
        told["runs"][run] = {}
        for question, points in rated.items():
            rows = [own for (name, _), own in points.items() if name == run]
            told["runs"][run][question] = {"mean": share(rows), "ci95": bootstrap(rows), "ratings": sum(map(len, rows))}
    return told | {"agreement": {question: agreement(points) for question, points in rated.items()}}


def agreement(ratings: Mapping[Any, Sequence[float]]) -> float | None:
    """Krippendorff's alpha for interval data: 1 - disagreement about the same thing / disagreement about any two.

    None if nothing was rated twice, or all ratings are equal.
    """
    units = [own for own in ratings.values() if len(own) > 1]
    every = [value for own in units for value in own]
    within = sum(sum((a - b) ** 2 for a, b in combinations(own, 2)) * 2 / (len(own) - 1) for own in units)
    among = sum((a - b) ** 2 for a, b in combinations(every, 2)) * 2
    return 1 - (len(every) - 1) * within / among if among else None
