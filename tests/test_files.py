import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cinema.files import atomic, write_json, write_text


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
