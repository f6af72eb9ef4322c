"""The book: its sources agree with the package, its extension works, and its built pages are whole.

Built pages are tested where `make book` has built them, and in a browser where Chromium is installed.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import Chromium, opened

from cinema.goldenmem import levels
from cinema.story import parse_story

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "_build" / "html"
CONF = """
import sys
sys.path.insert(0, {extension!r})
extensions = ["myst_parser", "sphinx.ext.autodoc", "notfound.extension", "sphinxext.opengraph", "book_pages"]
html_theme = "sphinx_book_theme"
html_theme_options = {{"use_repository_button": True, "repository_url": {url!r}}}
html_theme_options["launch_buttons"] = {{"colab_url": "https://example.org"}}
html_baseurl = ""
ogp_social_cards = {{"enable": False}}
exclude_patterns = ["_build"]
"""
PAGE = """# Page

```{film} ../film.mp4
:poster: /poster.png
:alt: A "red" <square> & a hat

The **caption** of a film.
```
"""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fe"
    "dccc59e70000000049454e44ae426082"
)


class Page(HTMLParser):
    """What a page points to, what it can be pointed at, and its video players."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.videos: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := named.get(key))}
        self.links += [value for key in ("href", "src", "poster") if (value := named.get(key))]
        if tag == "video":
            self.videos.append(named)


@cache
def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def dead_links(page: Path, root: Path) -> list[str]:
    """Local links of a page that lead to no file, out of the book, or to no anchor."""
    dead = []
    for link in read(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        outside = not target.is_relative_to(root.resolve())
        anchor = unquote(parts.fragment)
        if outside or not target.is_file() or (anchor and target.suffix == ".html" and anchor not in read(target).ids):
            dead.append(link)
    return dead


def build(folder: Path, page: str, url: str = "") -> tuple[int, str, Path]:
    """Build one page with the book's own extension, warnings as errors; status, messages and the page."""
    (folder / "conf.py").write_text(CONF.format(extension=str(ROOT / "book" / "_ext"), url=url))
    (folder / "index.md").write_text("# Book\n\n```{toctree}\nchapters/page\n```\n")
    (folder / "chapters").mkdir()
    (folder / "chapters" / "page.md").write_text(page)
    (folder / "film.mp4").write_bytes(b"film")
    (folder / "poster.png").write_bytes(PNG)
    flags = ["-q", "-n", "-W", "--keep-going", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *flags, str(folder), str(folder / "_build")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stderr, folder / "_build" / "chapters" / "page.html"


def sources() -> list[Path]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    names = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    return [
        next((ROOT / f"{name}{end}" for end in (".md", ".ipynb") if (ROOT / f"{name}{end}").exists()), ROOT / name)
        for name in names
    ]


def test_every_page_of_the_book_exists_and_every_file_is_in_the_book() -> None:
    assert not [str(p) for p in sources() if not p.is_file()]
    written = {*(ROOT / "book").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")}
    assert written == set(sources())


def test_the_landing_page_says_which_chapters_are_written() -> None:
    written = sorted(int(p.name[:2]) for p in (ROOT / "book" / "chapters").glob("*.md"))
    told = re.search(r"of its fifteen chapters, ([\d, and]+)\sare\swritten", (ROOT / "book" / "intro.md").read_text())
    assert told and [int(number) for number in re.findall(r"\d+", told[1])] == written


def test_labels_are_given_once() -> None:
    text = "\n".join(p.read_text() for p in sources() if p.suffix == ".md")
    labels = re.findall(r"^:(?:label|name): (\S+)$", text, re.M)
    assert len(labels) == len(set(labels)) > 20


def test_api_page_lists_every_module() -> None:
    listed = re.findall(r"automodule:: (\S+)", (ROOT / "book" / "api.md").read_text())
    paths = (p.relative_to(ROOT) for p in (ROOT / "cinema").rglob("*.py") if p.read_text().strip())
    names = {".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths}
    assert set(listed) == {n for n in names if not n.split(".")[-1].startswith("_")}
    assert len(listed) == len(set(listed))


def test_stories_in_the_text_are_stories() -> None:
    pages = [p for p in sources() if p.suffix == ".md"]
    blocks = [b for p in pages for b in re.findall(r"```\{code-block\} yaml\n(.*?)```", p.read_text(), re.S)]
    stories = [parse_story(block, "a page") for block in blocks if "shots:" in block]
    assert stories


def test_levels_in_the_text_are_the_package_s() -> None:
    text = (ROOT / "book" / "notation.md").read_text()
    stated = re.findall(r"\$s_0 = (\d+)\$[^;.]*?sides are ([\d, ]+)", text.replace("\n", " "))
    assert len(stated) == 2
    for side, sides in stated:
        assert ", ".join(map(str, levels(int(side), sides.count(",") + 1))) == sides


def test_notebooks_are_plain_markdown() -> None:
    """Colab and JupyterLab show MyST directives as raw text, so notebooks have none."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                assert not re.search(r"^(```|:::)\{|\{(py|doc|eq|cite)[\w:]*\}`", "".join(cell["source"]), re.M), (
                    path.name
                )


def test_first_cell_installs_only_where_cinema_is_missing(tmp_path: Path) -> None:
    """Alone, as on Colab, without an address, it says what to set; beside the package it does nothing."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        first = "".join(next(c["source"] for c in cells if c["cell_type"] == "code"))
        alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        blind = f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n{first}"
        ran = subprocess.run(
            [sys.executable, "-I", "-S", "-c", blind],
            cwd=tmp_path,
            env=alone,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode != 0 and "CINEMA_REPOSITORY" in ran.stderr.splitlines()[-1]
        beside = [sys.executable, "-c", first]
        ran = subprocess.run(beside, cwd=path.parent, env=os.environ, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_film_directive_brings_its_files(tmp_path: Path) -> None:
    status, messages, page = build(tmp_path, PAGE)
    assert status == 0, messages
    (video,) = read(page).videos
    assert video["preload"] == "none" and "controls" in video and "autoplay" not in video
    assert video["aria-label"] == 'A "red" <square> & a hat'
    assert (page.parent / str(video["poster"])).read_bytes() == PNG
    assert dead_links(page, page.parents[1]) == []
    assert "<strong>caption</strong>" in page.read_text()


def test_film_directive_refuses(tmp_path: Path) -> None:
    gone = PAGE.replace("film.mp4", "gone.mp4") + PAGE.replace("/poster.png", "/gone.png")
    status, messages, _ = build(tmp_path, gone + PAGE.replace(":poster: /poster.png\n", ""))
    assert status != 0
    for message in ("no file gone.mp4", "no file gone.png", "option :poster: is missing"):
        assert message in messages


def test_notebook_figure_is_copied_with_its_words(tmp_path: Path) -> None:
    drawn = "# Page\n\n```{figure} /poster.png\n:name: fig-drawn\n:alt: A hat\n\nDrawn.\n```\n\n"
    again = "```{notebook-figure} fig-drawn\n:name: fig-again\n\nDrawn, *again*.\n```\n"
    status, messages, page = build(tmp_path, drawn + again)
    assert status == 0, messages
    text = page.read_text()
    assert text.count('alt="A hat"') == 2 and "Drawn, <em>again</em>." in text and "fig-again" in read(page).ids
    assert dead_links(page, page.parents[1]) == []


def test_notebook_figure_refuses(tmp_path: Path) -> None:
    page = "# Page\n\n```{notebook-figure} fig-gone\n:name: fig-a\n\nGone.\n```\n"
    status, messages, _ = build(tmp_path, page + "```{notebook-figure} fig-bare\n:name: fig-b\n```\n")
    assert status != 0
    assert "no notebook draws a figure fig-gone" in messages and "fig-bare: give it a :name: and a caption" in messages


@pytest.mark.parametrize("url", ["", "https://github.com/someone/some-book"])
def test_repository_buttons_follow_the_address(url: str, tmp_path: Path) -> None:
    status, messages, page = build(tmp_path, PAGE, url)
    assert status == 0, messages
    assert ("source-repository-button" in page.read_text()) == bool(url)


def built_pages() -> list[Path]:
    if not (BUILT / "index.html").exists():
        pytest.skip("the book is not built; run `make book`")
    pages = sorted(BUILT.rglob("*.html"))
    return [p for p in pages if p.name != "404.html" and "_static" not in p.parts]  # 404 is served from the site's root


def test_built_pages_have_no_dead_links() -> None:
    dead = {str(p.relative_to(BUILT)): found for p in built_pages() if (found := dead_links(p, BUILT))}
    assert not dead


def test_built_films_have_posters() -> None:
    videos = [(p, v) for p in built_pages() for v in read(p).videos]
    with_poster = [(p, v) for p, v in videos if v.get("poster")]
    assert any(p == BUILT / "book" / "intro.html" for p, _ in with_poster)
    assert all((p.parent / str(v["poster"])).is_file() and v.get("aria-label") for p, v in with_poster)
    assert not [p for p, v in videos if "autoplay" in v]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with opened(tmp_path / "profile") as chromium:
        yield chromium


def test_browser_sees_what_is_missing(browser: Chromium, tmp_path: Path) -> None:
    """The instrument itself: a page with a good and a bad picture and poster is told apart."""
    (tmp_path / "good.png").write_bytes(PNG)
    tags = '<img src="{0}.png"><video poster="{0}.png"></video>'
    for name in ("good", "bad"):
        (tmp_path / f"{name}.html").write_text(f"<!doctype html>{tags.format(name)}")
    assert browser.open(tmp_path / "good.html") == {"posters": [], "images": [], "files": []}
    bad = (tmp_path / "bad.png").as_uri()
    seen = browser.open(tmp_path / "bad.html")
    assert seen["posters"] == [bad] and seen["images"] == [bad] and bad in seen["files"]


def test_built_pages_load_whole(browser: Chromium) -> None:
    pages = [p for p in built_pages() if "_modules" not in p.parts and p != BUILT / "index.html"]  # that one redirects
    whole = {"posters": [], "images": [], "files": []}
    broken = {str(p.relative_to(BUILT)): seen for p in pages if (seen := browser.open(p)) != whole}
    assert not broken
