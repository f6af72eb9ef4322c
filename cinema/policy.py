"""What must not be drawn: real persons. The policy is data: `policy.yaml`, and the file that CINEMA_POLICY names."""

import os
import re
from pathlib import Path
from typing import Literal
from unicodedata import combining, normalize

from pydantic import BaseModel

from cinema.errors import UserError
from cinema.story import Story, parse_form, read_text

WORD = re.compile(r"[^\W_]+")
POLICY = Path(__file__).with_name("policy.yaml")


class Policy(BaseModel, extra="forbid"):
    """Whom not to draw, and what happens to a story that names one."""

    names: Literal["refuse", "flag"]
    real_persons: list[str] = []


def policy() -> Policy:
    """The package's policy; the user's adds names, and says what happens. UserError as for a story."""
    own, path = parse_form(POLICY.read_text(encoding="utf-8"), str(POLICY), Policy), os.environ.get("CINEMA_POLICY")
    more = parse_form(read_text(Path(path), "a policy in YAML"), path, Policy) if path else own
    return Policy(names=more.names, real_persons=list(dict.fromkeys(own.real_persons + more.real_persons)))


def check_names(text: str) -> list[str]:
    """Real persons that a text names, a sentence each; UserError if the policy is to refuse them."""
    rules, words = policy(), _words(text)
    named = [
        name for name in rules.real_persons if _words(name) in words or f" {''.join(_words(name).split())} " in words
    ]
    if named and rules.names == "refuse":
        raise UserError(f"{named[0]} is a real person, and the policy refuses to draw those; invent a name")
    return [f"{name} is a real person: ask before you show the film, or invent a name" for name in named]


def concerns(story: Story) -> list[str]:
    """What a story should not have, a sentence each: real persons, and a cast that no shot shows; else as above."""
    told = [story.title, *(f"{c.tag} {c.description}" for c in story.cast), *(shot.caption for shot in story.shots)]
    absent = [character.tag for character in story.cast if character.tag not in story.first_appearances()]
    return [*check_names("\n".join(told)), *(f"{tag} is in the cast and in no shot" for tag in absent)]


def _words(text: str) -> str:
    """Its words, without accents, in lower case, one space around each."""
    plain = "".join(letter for letter in normalize("NFKD", text) if not combining(letter)).casefold()
    return f" {' '.join(WORD.findall(plain))} "
