"""Reading plain English: a storyline becomes beats, each saying who does what, where, and how it is seen.

A small deterministic reader that knows only what the toy world can draw; its words are in `lexicon.yaml`."""

import re
import textwrap
import unicodedata
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import yaml

from cinema.config import TOY_NAMES
from cinema.errors import UserError

_LOOKS = ("colour", "shape", "hat")


@dataclass
class _Token:
    kind: str
    value: str
    text: str
    used: bool = True


@dataclass
class Beat:
    """What a sentence, or a part of one, says of one shot; whatever is missing the text leaves open."""

    actors: dict[str, str | None] = field(default_factory=dict)  # tag -> action, in order of mention
    positions: dict[str, str] = field(default_factory=dict)
    setting: dict[str, str] = field(default_factory=dict)  # place, size, camera


def _pattern() -> re.Pattern[str]:
    """One pattern for everything: a group `kind__value` for each entry of the lexicon, unknown words last."""
    lexicon = yaml.safe_load(Path(__file__).with_name("lexicon.yaml").read_text(encoding="utf-8"))
    parts, edge = list[str](), r"(?!\B\w)"  # of a word
    for kind, entries in lexicon.items():
        for value, words in entries.items():
            words = words.replace(")+", r")(?:e?s|\w?ed|\w?ing)?").replace("~", "(?:e[sd]?|ing)").replace("\n", "|")
            parts.append(f"(?P<{kind}__{value.replace(' ', '_')}>{edge}(?:{words}){edge})")
    unknown = r"(?P<verb>\w{2,}(?:s|ed|ing)\b)|(?P<word>[^\W_](?:[\w-]|['’](?-i:(?=[A-Z])))*)"
    return re.compile("|".join([*parts, unknown]), re.IGNORECASE)


_PATTERN = _pattern()


def _tokens(text: str) -> list[_Token]:
    found = [(*(m.lastgroup or "").partition("__"), m[0]) for m in _PATTERN.finditer(text)]
    return [_Token(kind, value.replace("_", " "), word) for kind, _, value, word in found]


def _find_names(sentences: list[list[_Token]]) -> None:
    """Mark as names capitalised words that act or are met, not `in Paris`; or `the fox`, where nobody has a name."""
    names = set[str]()
    for tokens in sentences:
        for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
            acts = after and (after.kind == "action" or (after.kind == "verb" and token.text[-1] != "s"))
            met = before and before.value not in ("in", "to")
            surname = before and before.text in names
            unknown = token.kind in ("word", "verb") and not token.value and token.text[0].isupper()
            if unknown and not surname and (acts or met or token.text.lower() in TOY_NAMES):
                names.add(token.text)
    for token in chain(*sentences):
        if token.text in names or (token.kind == "noun" and not names):
            token.kind = "name"


class StorylineReader:
    """Reads a storyline into `beats`, and a `cast`: tag -> what the text says of its colour, shape and hat.

    `understood` and `left_out` are, per sentence, words that were used and words that were not. UserError if the text
    names nobody.
    """

    def __init__(self, text: str) -> None:
        heading = re.match(r"\s*([^.!?\n]{3,80})\n\s*\n", text)
        self.heading = heading[1] if heading else None
        parts = re.split(r"(?<=[.!?…])[\"'”’)]*\s+|\n\s*\n", text[heading.end() if heading else 0 :])
        lines = [line for part in parts for line in textwrap.wrap(" ".join(part.split()), 1_000)]
        sentences = [_tokens(line) for line in lines]
        _find_names(sentences)
        self.cast, self.beats, self.beat = dict[str, dict[str, str]](), list[Beat](), Beat()
        self.recent = list[str]()  # tags, last mentioned last
        self.understood, self.left_out = list[str](), list[str]()
        for number, tokens in enumerate(sentences, 1):
            self._read(tokens)
            told = [f"“{t.text}” = {t.value}" for t in tokens if t.used and t.kind not in ("filler", "end")]
            left = [f"“{t.text}”" for t in tokens if not t.used]
            self.understood += [f"sentence {number}: {'; '.join(told)}"] if told else []
            self.left_out += [f"sentence {number}: {'; '.join(left)}"] if left else []
        if self.beat.setting:
            self.beats.append(self.beat)
        if not self.cast:
            raise UserError("the storyline names nobody that I know; say who does what: 'Ada jumps in the forest.'")

    def _read(self, tokens: list[_Token]) -> None:
        """A sentence, word by word; a handler `_on_kind` makes of a word what it can, and says whether it could."""
        self.last: str | None = None  # who was mentioned last in this sentence
        self.doers, self.acted = list[str](), False  # who acts in it, and whether they did yet
        ends = [-1, *(i for i, token in enumerate(tokens) if token.kind == "end"), len(tokens)]
        for start, end in pairwise(ends):
            for i in range(start + 1, end):
                self.before, token, self.after = tokens[start + 1 : i], tokens[i], tokens[i + 1 : end]
                handle = getattr(self, f"_on_{token.kind}", None)
                token.used = handle(token) if handle else token.kind not in ("word", "verb", "noun")
        if self.beat.setting.keys() == {"camera"} and not self.beat.actors and self.beats:
            self.beats[-1].setting |= self.beat.setting  # a mere camera move is the last shot's, other settings wait
            self.beat = Beat()
        self._cut()

    def _cut(self, actors: dict[str, str | None] | None = None) -> None:
        """Begin another shot, of these actors."""
        if self.beat.actors or "place" in self.beat.setting:
            self.beats.append(self.beat)
            self.beat = Beat(actors or {})

    def _tags(self, token: _Token) -> list[str]:
        """Of a name; or of a pronoun, which is whoever was mentioned last, and `him` is not who does it."""
        if token.kind == "pronoun":
            others = token.text.lower() in ("him", "her", "them")
            known = [tag for tag in self.recent if not (others and tag in self.beat.actors)]
            return known[{"one": -1, "two": -2}.get(token.value, 0) :]
        plain = re.sub(r"^[^a-z]+|[^a-z0-9_-]", "", unicodedata.normalize("NFKD", token.text.lower()))
        return [f"<{plain or 'x' + token.text.encode().hex()}>"]

    def _on_name(self, token: _Token) -> bool:
        """Somebody is mentioned: as one who will act or, after a verb, as one acted upon; `with Bo`, both act."""
        tags, shared = self._tags(token), None
        if any(t.kind in ("action", "verb") for t in self.before):
            shared = self.beat.actors.get(self.doers[-1]) if self.doers and self.before[-1].text == "with" else None
        else:
            self.doers, self.acted = [*([] if self.acted else self.doers), *tags], False
        for tag in tags:
            self.cast.setdefault(tag, {})
            self.recent = [*(t for t in self.recent if t != tag), tag]
            self.beat.actors.setdefault(tag, shared)
            self.last = tag
        token.value = ", ".join(tags)
        return bool(tags)

    def _on_action(self, token: _Token) -> bool:
        """The doers do this; a second action of theirs begins another shot, but whoever jumps need not stand."""
        if not self.last:  # `there stands Ada`
            self.doers = next((self._tags(t) for t in self.after if t.kind == "name"), [])
        action, done = token.value, {self.beat.actors.get(doer) for doer in self.doers}
        if action != "standing" and done - {None, "standing", action}:
            self._cut(dict.fromkeys(self.doers))
        self.beat.actors |= {d: action for d in self.doers if action != "standing" or not self.beat.actors.get(d)}
        self.acted = True
        return bool(self.doers)

    def _on_position(self, token: _Token) -> bool:
        owner = self.last or next((self._tags(t)[0] for t in self.after if t.kind == "name"), None)
        self.beat.positions |= {owner: token.value} if owner else {}
        return owner is not None

    def _on_place(self, token: _Token) -> bool:
        """Place, size or camera of the shot; a second one begins another shot of the same actors.

        But a village by the sea is a village: a second set counts only where somebody goes `to` it.
        """
        known = self.beat.setting.get(token.kind, token.value)
        if known != token.value:
            if token.kind == "place" and not any(t.value == "to" for t in self.before):
                return False
            self._cut(dict(self.beat.actors))
        self.beat.setting[token.kind] = token.value
        return True

    def _on_look(self, token: _Token) -> bool:
        """A look is of the name that follows, or else of whoever was mentioned last, whom the first word describes."""
        following = next((t for t in self.after if t.kind not in ("word", *_LOOKS)), token)
        owner = self._tags(following)[0] if following.kind == "name" else self.last
        if not owner or any(t.kind in ("hat", "place") for t in self.after[:1]):  # the hat's own colour, a blue sea
            return False
        return self.cast.setdefault(owner, {}).setdefault(token.kind, token.value) == token.value

    _on_pronoun, _on_size, _on_camera = _on_name, _on_place, _on_place
    _on_colour = _on_shape = _on_hat = _on_look
