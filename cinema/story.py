"""The data model: one `Story` is written by people, read from films, trained on, generated and scored.

A story is a title, a cast, its sets and its shots in order. A character is named in captions by a tag
such as ``<ada>``; a look is described in words, at the character's first appearance only, so that later
shots can be drawn right only by whoever remembers.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cinema.errors import UserError

TAG = re.compile(r"<[a-z][a-z0-9_-]*>")
MAX_SHOTS = 5_000
SCHEMA_VERSION: Literal[1] = 1

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Tag = Annotated[str, Field(pattern=rf"^{TAG.pattern}$", description="a name in angle brackets, e.g. <ada>")]


class StoryError(UserError):
    """A story that cannot be used; its message is one sentence: what, where, and the cure."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Character(_Model):
    """Somebody of the cast: a tag for captions and a description of the look."""

    tag: Tag
    description: str = ""


class Place(_Model):
    """A set, by the name that shots use, and its description."""

    name: str = Field(min_length=1, max_length=80)
    description: str = ""


class Source(_Model):
    """Where in a film a curated shot comes from; frames count in presentation order from 0, `end` is exclusive."""

    film: str
    start_frame: int = Field(ge=0)
    end_frame: int = Field(gt=0)
    start_s: float = Field(ge=0)
    end_s: float = Field(gt=0)


class Shot(_Model):
    """One shot: its caption, its set, how long it lasts, and the files that hold what was made of it.

    `keyframe` and `clip` are paths relative to the folder of the story file; they never leave it.
    """

    caption: str = Field(min_length=1, max_length=4_000)
    set: str | None = None
    duration: float = Field(default=2.125, gt=0, le=600, strict=True, description="seconds")
    keyframe: str | None = None
    clip: str | None = None
    source: Source | None = None

    @property
    def tags(self) -> list[str]:
        """Tags of the caption, in order of appearance, each once."""
        return list(dict.fromkeys(TAG.findall(self.caption)))

    @field_validator("caption")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip() or _CONTROL.search(value):
            raise ValueError("the caption is blank or holds control characters; say in words what is seen")
        return value

    @field_validator("keyframe", "clip")
    @classmethod
    def _stays_inside(cls, value: str | None) -> str | None:
        if value is not None and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError(f"{value!r} leaves the story's folder; use a path inside it")
        return value


class Story(_Model):
    """A whole story; see the module's text. Every tag in a caption is in the cast, every shot's set is listed."""

    schema_version: Literal[1] = SCHEMA_VERSION
    title: str = Field(min_length=1, max_length=200)
    cast: list[Character] = []
    sets: list[Place] = []
    shots: list[Shot] = Field(min_length=1, max_length=MAX_SHOTS)

    @model_validator(mode="after")
    def _names_agree(self) -> "Story":
        tags = [c.tag for c in self.cast]
        if twice := {t for t in tags if tags.count(t) > 1}:
            raise ValueError(f"the cast lists {', '.join(sorted(twice))} twice; give each character one entry")
        names = [p.name for p in self.sets]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"the sets list {min(twice)!r} twice; give each set one entry")
        for i, character in enumerate(self.cast):
            if unknown := [t for t in TAG.findall(character.description) if t not in tags]:
                raise ValueError(f"cast.{i}: {unknown[0]} is not in the cast; add it there or correct the tag")
        places = set(names)
        for i, shot in enumerate(self.shots):
            if unknown := [t for t in shot.tags if t not in tags]:
                raise ValueError(f"shots.{i}: {unknown[0]} is not in the cast; add it there or correct the tag")
            if shot.set is not None and shot.set not in places:
                raise ValueError(f"shots.{i}: the set {shot.set!r} is not listed under sets; add it there")
        return self

    def character(self, tag: str) -> Character:
        """The character with this tag; KeyError if there is none."""
        for c in self.cast:
            if c.tag == tag:
                return c
        raise KeyError(tag)

    def first_appearances(self) -> dict[str, int]:
        """Tag → index of the first shot whose caption names it."""
        first: dict[str, int] = {}
        for i, shot in enumerate(self.shots):
            for tag in shot.tags:
                first.setdefault(tag, i)
        return first


def load_story(path: str | Path) -> Story:
    """Read a story from a YAML (or JSON) file.

    Raises:
        StoryError: the file is missing, is not YAML, or is not a story; the message names the line and the cure.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is not a readable text file"
        raise StoryError(f"{path}: {reason}; give the path of a story in YAML") from None
    return parse_story(text, str(path))


def parse_story(text: str, name: str = "story") -> Story:
    """Read a story from YAML text; `name` stands for the file in messages. Raises StoryError as `load_story` does."""
    try:
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        data = yaml.load(text, Loader=yaml.CSafeLoader)
        twice = next(_repeated(node), None)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that cannot be
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise StoryError(f"{name}{where}: not valid YAML ({problem}); correct it there") from None
    if twice is not None:
        line = twice.start_mark.line + 1
        raise StoryError(f"{name}, line {line}: {_short(twice.value)} stands there a second time; keep one of them")
    if not isinstance(data, dict):
        raise StoryError(f"{name}: not a story; it needs title, cast, sets and shots")
    try:
        return Story.model_validate(data)
    except ValidationError as error:
        raise StoryError(_one_sentence(name, node, error)) from None


def save_story(story: Story, path: str | Path) -> None:
    """Write a story as YAML; the file appears whole or not at all."""
    from cinema.files import write_text

    data = story.model_dump(exclude_none=True, exclude_defaults=False)
    write_text(Path(path), yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


def _one_sentence(name: str, node: yaml.Node | None, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    steps: list[Any] = list(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not steps and (found := re.match(r"(shots|cast)\.(\d+): ", message)):
        steps, message = [found[1], int(found[2])], message[found.end() :]
    if first["type"] == "too_long" and steps == ["shots"]:
        message = f"{len(first['input'])} shots; a story holds at most {MAX_SHOTS}, split it"
    elif first["type"] == "too_short" and steps == ["shots"]:
        message = "a story needs at least one shot; add one with a caption"
    elif first["type"] == "missing":
        message = "is missing; add it"
    elif first["type"] == "extra_forbidden":
        message = "is not a known key; remove or correct it"
    elif "input" in first and not isinstance(first["input"], dict | list) and first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {_short(first['input'])}"
    where = ".".join(str(s) for s in steps)
    line = _line_of(node, steps)
    return f"{name}{f', line {line}' if line else ''}: {where + ': ' if where else ''}{message}"


def _short(value: object) -> str:
    """Input as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line_of(node: yaml.Node | None, steps: list[Any]) -> int | None:
    for step in steps:
        child = next(_children(node, step), None)
        if child is None:
            break
        node = child
    return node.start_mark.line + 1 if node is not None else None


def _repeated(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Keys that their mapping has had before: YAML lets the last win, and the first would be lost unsaid."""
    waiting, known = [node] if node is not None else [], set[int]()  # a node may stand in many places, or in itself
    while waiting:
        node = waiting.pop()
        if id(node) in known or not isinstance(node, yaml.CollectionNode):
            continue
        known.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, str(key.value)) for key, _ in node.value]
            yield from (key for i, (key, _) in enumerate(node.value) if keys[i] in set(keys[:i]))
        waiting += [child[1] if isinstance(child, tuple) else child for child in node.value]


def _children(node: yaml.Node | None, step: Any) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (value for key, value in node.value if key.value == step)
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
        yield from node.value[step : step + 1]
