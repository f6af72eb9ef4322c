import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cinema.errors import UserError
from cinema.files import atomic, sweep, write_json, write_text


def test_text_and_json_come_back_as_written(tmp_path: Path):
    write_text(tmp_path / "deep" / "a.txt", "Zoë – ok\n")
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "Zoë – ok\n"
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": "é"})
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["b", "a"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "story.yaml"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk on fire"), atomic(path) as part:
        part.write_text("half of the ne")
        raise RuntimeError("disk on fire")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["story.yaml"]


def test_the_part_keeps_the_suffix_and_the_folder(tmp_path: Path):
    with atomic(tmp_path / "film.mp4") as part:  # the suffix tells a video writer the format
        assert part.suffix == ".mp4" and part.parent == tmp_path and part != tmp_path / "film.mp4"
        part.write_bytes(b"x")


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path):
    path = tmp_path / "story.yaml"
    write_text(path, "old")
    program = (
        "import os, sys, pathlib\nfrom cinema.files import atomic\n"
        "with atomic(pathlib.Path(sys.argv[1])) as part:\n"
        "    part.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_link_is_followed_and_what_is_no_file_is_refused(tmp_path: Path):
    write_text(tmp_path / "real.txt", "old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UserError, match="no ordinary file"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()


def test_sweeping_removes_what_killed_runs_left_and_nothing_else(tmp_path: Path):
    for name in (".a.part1.mp4", ".b.part22.mp4", "a.mp4", ".a.mp4", "a.part1.mp4"):
        (tmp_path / name).touch()
    sweep(tmp_path, "a")
    assert not (tmp_path / ".a.part1.mp4").exists() and (tmp_path / ".b.part22.mp4").exists()
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.mp4", "a.mp4", "a.part1.mp4"]
