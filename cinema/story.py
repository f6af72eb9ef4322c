"""The data model: one `Story` is written by people, read from films, trained on, generated and scored.

Captions name a character by a tag such as ``<ada>``, and describe its look at its first appearance only: later shots
can be drawn right only by whoever remembers."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cinema.errors import UserError
from cinema.files import write_text

TAG = re.compile(r"<[a-z][a-z0-9_-]*>")
Tag = Annotated[str, Field(pattern=rf"^{TAG.pattern}$", description="a name in angle brackets, e.g. <ada>")]
Form = TypeVar("Form", bound=BaseModel)


class _Model(BaseModel, extra="forbid", validate_assignment=True): ...


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

    caption: str = Field(max_length=4_000)
    set: str | None = None
    duration: float = Field(default=2.125, gt=0, le=600, strict=True, description="seconds")
    keyframe: str | None = None
    clip: str | None = None
    source: Source | None = None

    @field_validator("caption")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip() or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", value):
            raise ValueError("the caption is blank or holds control characters; say in words what is seen")
        return value

    @property
    def tags(self) -> list[str]:
        """Tags of the caption, in order of appearance, each once."""
        return list(dict.fromkeys(TAG.findall(self.caption)))

    @field_validator("keyframe", "clip")
    @classmethod
    def _stays_inside(cls, value: str | None) -> str | None:
        if value is not None and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError(f"{value!r} leaves the story's folder; use a path inside it")
        return value


class Story(_Model):
    """A whole story; see the module's text. Every tag in a caption is in the cast, every shot's set is listed."""

    schema_version: Literal[1] = 1
    title: str = Field(min_length=1, max_length=200)
    cast: list[Character] = []
    sets: list[Place] = []
    shots: list[Shot] = Field(min_length=1, max_length=5_000)

    @model_validator(mode="after")
    def _names_agree(self) -> "Story":
        tags, places = [c.tag for c in self.cast], [p.name for p in self.sets]
        for where, names in (("cast", tags), ("sets", places)):
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise ValueError(f"{where} list {twice[0]!r} twice; keep one of them")
        uses = [(f"cast.{i}", TAG.findall(c.description), None) for i, c in enumerate(self.cast)]
        for where, mentioned, place in [*uses, *((f"shots.{i}", s.tags, s.set) for i, s in enumerate(self.shots))]:
            if unknown := [tag for tag in mentioned if tag not in tags]:
                raise ValueError(f"{where}: {unknown[0]} is not in the cast; add it there or correct the tag")
            if place not in (None, *places):
                raise ValueError(f"{where}: the set {place!r} is not listed under sets; add it there")
        return self

    def first_appearances(self) -> dict[str, int]:
        """Tag → index of the first shot whose caption names it."""
        return {tag: i for i, shot in reversed([*enumerate(self.shots)]) for tag in shot.tags}


class _Bank(BaseModel):
    cast: list[Character]


def load_story(path: str | Path) -> Story:
    """Read a story from a YAML (or JSON) file; UserError, with the line and the cure, if it does not hold one."""
    return parse_story(read_text(Path(path), "a story in YAML"), str(path))


def load_cast(path: Path) -> list[Character]:
    """The `cast` of a YAML file, a story or nothing but a character bank; UserError as for `load_story`."""
    return parse_form(read_text(path, "a cast in YAML"), str(path), _Bank).cast


def read_text(path: Path, wanted: str) -> str:
    """The text of a file that the user names; UserError if there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is not a readable text file"
        raise UserError(f"{path}: {reason}; give the path of {wanted}") from None


def parse_story(text: str, name: str = "story") -> Story:
    """Read a story from YAML text; `name` stands for the file in messages. Raises UserError as `load_story` does."""
    return parse_form(text, name, Story)


def parse_form(text: str, name: str, form: type[Form]) -> Form:
    """Read one of our forms from YAML text, as `parse_story` reads a story."""
    try:
        node, data = yaml.compose(text, yaml.CSafeLoader), yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that cannot be
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{where}: not valid YAML ({problem}); correct it there") from None
    if node is None or not isinstance(data, dict):
        needs = " and ".join(field for field, about in form.model_fields.items() if about.is_required())
        raise UserError(f"{name}: not a {form.__name__.strip('_').lower()}; it needs {needs}")
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise UserError(_one_sentence(name, node, error)) from None


def save_story(story: Story, path: str | Path) -> None:
    """Write a story as YAML; the file appears whole or not at all."""
    data = story.model_dump(exclude_none=True)
    write_text(Path(path), yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


def _one_sentence(name: str, node: yaml.Node, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    steps, message = list[Any](first["loc"]), first["msg"].removeprefix("Value error, ")
    if found := re.match(r"(shots|cast)\.(\d+): ", message):
        steps, message = [found[1], int(found[2])], message[found.end() :]
    if first["type"] != "value_error":  # pydantic's words
        given = "" if isinstance(first["input"], dict | list) else f" ({first['input']!r:.60} is given)"
        message = f"{message[0].lower()}{message[1:]}{given}; correct it"
    for step in steps:  # to the node in question, or as near as there is one
        pairs = [(k.value, v) for k, v in node.value] if isinstance(node, yaml.MappingNode) else enumerate(node.value)
        node = next((inner for key, inner in pairs if key == step), node)
    return ": ".join([f"{name}, line {node.start_mark.line + 1}", *[".".join(map(str, steps))] * bool(steps), message])
