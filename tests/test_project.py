"""What every file of the project must keep: sizes, formats, promises of the README, and the style of the package."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path
from statistics import median

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MIB = 2**20
TEXT = {"", ".bib", ".cff", ".css", ".ipynb", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def project_files() -> list[Path]:
    """Files of the checkout that git tracks or would track."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [p for p in paths if p.is_file()]


def modules() -> list[Path]:
    return sorted((ROOT / "cinema").rglob("*.py"))


def definitions(tree: ast.AST) -> list[FUNCTION]:
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def public_without_docstring(node: ast.AST, owner: str) -> list[str]:
    """Names below `node` that are public, defined at module or class level, and undocumented."""
    found = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTION | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{owner}.{child.name}"
        overloaded = any("overload" in ast.unparse(d) for d in child.decorator_list)
        if not ast.get_docstring(child) and not overloaded:
            found.append(name)
        if isinstance(child, ast.ClassDef):
            found += public_without_docstring(child, name)
    return found


def test_files_are_small() -> None:
    sizes = {p: p.stat().st_size for p in project_files()}
    assert not [str(p) for p, size in sizes.items() if size > 16 * MIB]
    assert sum(sizes.values()) < 50 * MIB


def test_no_pickles_and_no_gifs() -> None:
    banned = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".npy", ".joblib", ".gif"}
    assert not [str(p) for p in project_files() if p.suffix.lower() in banned]


def test_readme_names_both_commands_and_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in ("book", "test"):
        assert f"$ make {command}" in text and command in targets
    folders = {p.relative_to(ROOT).parts[0] for p in project_files() if len(p.relative_to(ROOT).parts) > 1}
    assert not [f for f in folders if f"{f}/" not in text]


def test_readme_shows_files_that_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)]
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = [Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["book"]]
    assert not [str(r) for r in wanted if pinned.get(canonicalize_name(r.name), "") not in r.specifier]


def test_no_address_of_a_registry_and_no_path_of_a_machine() -> None:
    banned = re.compile(
        r"pypi\.(org|python)|files\.pythonhosted|download\.pytorch\.org|(?<![\w.~>}])/(work|root|home|opt|Users)/\w"
    )
    texts = ((p, p.read_text(encoding="utf-8")) for p in project_files() if p.suffix in TEXT)
    assert not [f"{p.relative_to(ROOT)}: {found[0]}" for p, text in texts if (found := banned.search(text))]


def test_notebooks_store_no_outputs() -> None:
    notebooks = [p for p in project_files() if p.suffix == ".ipynb"]
    assert notebooks
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code" and "skip-execution" not in cell["metadata"].get("tags", []):
                assert cell["outputs"] == [] and cell["execution_count"] is None, path.name


def test_repository_address_is_named_once() -> None:
    """Whoever sets `repository.url` finds that address nowhere else in the sources."""
    found = re.search(r'^\s+url: "(.*)"$', (ROOT / "_config.yml").read_text(), re.M)
    assert found, "_config.yml has no repository.url"
    texts = [p.read_text(encoding="utf-8") for p in project_files() if p.suffix in TEXT and p.name != "_config.yml"]
    assert not found[1] or not [text for text in texts if found[1] in text]


def test_every_public_name_is_documented() -> None:
    missing = []
    for path in modules():
        tree = ast.parse(path.read_text())
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        missing += [name] if tree.body and not ast.get_docstring(tree) else []
        missing += public_without_docstring(tree, name)
    assert not missing


def test_functions_are_short_and_typed() -> None:
    lengths, long, untyped = [], [], []
    for path in modules():
        for node in definitions(ast.parse(path.read_text())):
            name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            lengths.append(node.end_lineno - node.lineno + 1)
            long += [name] if lengths[-1] > 60 else []
            named = [a for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            if any(a.annotation is None and a.arg not in ("self", "cls") for a in named):
                untyped.append(name)
    assert not long and not untyped
    assert median(lengths) <= 12


def code_lines(path: Path) -> int:
    """Lines that hold code: without docstrings, comments and blank lines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    kept = {line for node in ast.walk(tree) if hasattr(node, "lineno") for line in (node.lineno, node.end_lineno)}
    return len(kept)


def test_package_is_small() -> None:
    lines = sum(code_lines(path) for path in modules())
    assert lines < 7_450, f"{lines} lines of code"


def test_jaxtyping_signatures_are_not_postponed() -> None:
    """`from __future__ import annotations` would turn shape contracts into strings that nothing checks."""
    assert not [str(p) for p in modules() if re.search(r"^from __future__ import .*annotations", p.read_text(), re.M)]


def test_make_says_what_is_missing(tmp_path: Path) -> None:
    """Without any usable Python, one line says so; nothing is made."""
    make = ["make", "-s", "book", "PYTHON=", f"VENV={tmp_path / 'venv'}"]
    try:
        ran = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("make is not installed")
    assert ran.returncode != 0 and "Python 3.11 or newer" in ran.stdout
    assert len(ran.stdout.splitlines()) == 1 and not (tmp_path / "venv").exists()


@pytest.mark.parametrize("story", ["", "no-such-file.yaml"])
def test_make_movie_needs_a_story(story: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    make = ["make", "-s", "-o", f"{venv}/.installed", "movie", f"STORY={story}", f"VENV={venv}"]
    try:
        ran = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("make is not installed")
    assert ran.returncode != 0 and len(ran.stdout.splitlines()) == 1 and "story" in ran.stdout
