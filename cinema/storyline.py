"""Reading plain English: a storyline becomes beats, each saying who does what, where, and how it is seen.

A small deterministic reader that knows only what the toy world can draw; its words are in `lexicon.yaml`."""

import re
import textwrap
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cinema.config import TOY_NAMES
from cinema.errors import UserError

MAX_CAST = 100
LOOKS = ("colour", "shape", "hat")
_PEOPLE = ("name", "pronoun", "creature", "group")
_TOLD = ("place", "size", "camera", "position", "action", *LOOKS)
_SMALL = ("det", "prep", "filler", "link")  # kinds that stand between the words that count
_WEATHER = ("snow", "night")  # these give way to a set that is a place: a moonlit forest is a forest
_LEXICON = yaml.safe_load(Path(__file__).with_name("lexicon.yaml").read_text(encoding="utf-8"))
_NOBODY, _WHERE = (re.compile(_LEXICON[key].replace("\n", "|")) for key in ("nobody", "where"))
_VERB = re.compile(r"^\w{2,}(?:s|ed|ing)$")  # looks like a verb, when it is no word of ours


@dataclass
class _Token:
    kind: str
    value: str
    text: str
    start: int
    end: int
    used: bool
    tags: tuple[str, ...] = ()  # whom it names


_NONE = _Token("", "", "", 0, 0, False)


@dataclass
class Beat:
    """What a sentence, or a part of one, says of one shot; whatever is missing the text leaves open."""

    actors: dict[str, str | None] = field(default_factory=dict)  # tag -> action, in order of mention
    objects: set[str] = field(default_factory=set)  # those whom others act upon; a close shot leaves them out
    positions: dict[str, str] = field(default_factory=dict)
    setting: dict[str, str] = field(default_factory=dict)  # place, size, camera


def _pattern(names: set[str]) -> re.Pattern[str]:
    """One pattern for everything: names first, then a group `kind__value` for each entry, unknown words last."""
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    parts, edge = [rf"(?-i:(?P<name><(?:{known.lower()})>|\b(?:{known})(?!\w)))"], r"(?!\B\w)"  # `edge` of a word
    for kind, entries in _LEXICON["words"].items():
        for value, words in entries.items():
            words = words.replace(")+", r")(?:e?s|\w?ed|\w?ing)?").replace("~", "(?:e[sd]?|ing)").replace("\n", "|")
            parts.append(f"(?P<{kind}__{value.replace(' ', '_')}>{edge}(?:{words}){edge})")
    return re.compile("|".join([*parts, r"(?P<word>[^\W_][\w-]*)"]), re.IGNORECASE)


def _sentences(text: str) -> tuple[str | None, list[str]]:
    """A heading line, if there is one, and the sentences."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|St)\.", r"\1", text.strip())
    text = text.lower() if text.isupper() else text
    title = None
    if heading := re.match(r"#+ *(\S.*)\n|([^.!?\n]{3,80})\n\s*\n", text):
        title, text = (heading[1] or heading[2]).strip(), text[heading.end() :]
    parts = re.split(r"(?<=[.!?…])[\"'”’)]*\s+|\n\s*\n|\n(?=\s*(?:[-*•]|\d+[.)])\s)", text)
    short = [line for part in parts for line in textwrap.wrap(" ".join(part.split()), 1_000)]
    return title, [line for line in short if re.search(r"[^\W\d]", line)]


def _names(sentences: list[str]) -> set[str]:
    """Capitalised words that act or are met; `In Paris` names nobody."""
    plain, names, text = _pattern(set()), set[str](), " ".join(sentences)
    if text == text.lower():  # whoever writes no capitals may still use the toy world's names
        return {w for w in re.findall(r"\w+", text) if w in TOY_NAMES}
    for sentence in sentences:
        words = re.findall(r"[^\W\d_](?:[\w-]|['’](?=[A-Z]))*", sentence)
        for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
            if word[0].isupper() and not _NOBODY.fullmatch(word.lower()):
                known, then = ((m.lastgroup or "") if (m := plain.fullmatch(w)) else "word" for w in (word, after))
                acts = then.startswith("action") or (_VERB.search(after) and not word.endswith("s"))
                met = before and not _WHERE.fullmatch(before.lower())
                if word.lower() in TOY_NAMES or (known == "word" and (acts or met)):
                    names.add(word)
    return names


class StorylineReader:
    """Reads a storyline into `beats`, and a `cast`: tag -> what the text says of its colour, shape and hat.

    `understood` and `left_out` are, per sentence, words that were used and words that were not. UserError if the text
    says nothing that the toy world knows, or names too many characters. Every kind of token has a handler, `_on_kind`.
    """

    def __init__(self, text: str) -> None:
        self.heading, sentences = _sentences(text)
        self.names = _names(sentences)
        if len(self.names) > MAX_CAST:
            raise UserError(f"the storyline names {len(self.names)} characters; a story has {MAX_CAST} at most")
        self.cast = dict[str, dict[str, str]]()
        self.recent, self.doers = list[str](), list[str]()  # tags, last mentioned last; who acted last
        self.said = dict[str, str]()  # tag -> she, he or it
        self.tags_of = dict[str, str]()  # "Ada" or "fox", in lower case -> tag
        self.beats, self.understood, self.left_out = list[Beat](), list[str](), list[str]()
        pattern = _pattern(self.names)
        for number, sentence in enumerate(sentences, 1):
            self._read(f"sentence {number}: ", sentence, pattern)
        if not self.beats:
            raise UserError("the storyline names no set, character or action that I know; say who does what and where")
        if not self.cast:
            self._invent()

    def _read(self, where: str, text: str, pattern: re.Pattern[str]) -> None:
        tokens, self.beat = list[_Token](), Beat()
        for match in pattern.finditer(text):
            kind, _, value = (match.lastgroup or "").partition("__")
            if kind == "name" and tokens and tokens[-1].kind == kind and match.start() - tokens[-1].end == 1:
                tokens[-1].end = match.end()  # a surname
            else:
                used = kind not in ("word", "denied")
                tokens.append(_Token(kind, value.replace("_", " "), match[0], *match.span(), used))
        self.waiting = list[str]()  # named, and yet to act
        self.ahead = dict[str, _Token]()  # said of whoever is named next
        self.clause = list[_Token]()  # tokens before this one, as far as they belong together
        for i, token in enumerate(tokens):
            self.past, self.coming = tokens[:i], tokens[i + 1 :]
            if handle := getattr(self, f"_on_{token.kind}", None):
                handle(token)
            self.clause = [] if token.kind in ("link", "pause", "break") else [*self.clause, token]
        if action := self.ahead.pop("action", None):
            self._act(action)
        if "position" in self.ahead and self.beat.actors:
            self.beat.positions.setdefault(list(self.beat.actors)[-1], self.ahead["position"].value)
        self.doers = self.waiting or self.doers
        if self.beat.actors or self.beat.setting:
            self.beats.append(self.beat)
        told = [
            f"“{t.text}” = {', '.join(t.tags) or t.value}" for t in tokens if t.used and (t.tags or t.kind in _TOLD)
        ]
        marks = "".join("x" if not t.used else "-" if t.kind in _SMALL else "." for t in tokens)
        spans = [(tokens[m.start()].start, tokens[m.end() - 1].end) for m in re.finditer("x(?:-*x)*", marks)]
        self.understood += [where + "; ".join(told)] if told else []
        self.left_out += [where + "; ".join(f"“{text[start:end]}”" for start, end in spans)] if spans else []

    def _cut(self, keep: dict[str, str | None]) -> None:
        """Begin another shot within the sentence, with these actors; who only just came leaves the old one."""
        if not self.beat.actors:
            return
        for tag in keep:
            if self.beat.actors.get(tag, "") is None and len(self.beat.actors) > 1:
                del self.beat.actors[tag]
        self.beats.append(self.beat)
        self.beat = Beat(dict(keep))

    def _before(self, *skip: str) -> _Token:
        return next((t for t in reversed(self.past) if t.kind not in skip), _NONE)

    def _on_name(self, token: _Token) -> None:
        self._mention(token, self._tag(token.text))

    def _on_pronoun(self, token: _Token) -> None:
        """`she`, `him`, `both`: the last who fit; `two friends` whom nobody has named are invented."""
        word, many = token.text.lower(), token.value.isdigit()
        count = int(token.value) if many else 1
        it = word == "it" and [t.kind for t in self.coming[:1]] != ["action"]
        if it and "it" not in self.said.values():
            return  # `it is cold` is about nobody
        while many and not self.names and len(self.cast) < count and (not self.cast or word.startswith("t")):
            self._invent()
        busy = self.doers + self.waiting if it or word in ("him", "her", "them") else []
        others = [t for t in self.recent if t not in busy]
        if not many:
            fitting = [t for t in others if self.said.get(t, token.value) == token.value]
            others = fitting or others or self.recent[-1:] or [self._invent()]
            self.said.setdefault(others[-1], token.value)
        self._mention(token, *sorted(others[-count:], key=list(self.cast).index))

    def _on_creature(self, token: _Token) -> None:
        """`the fox` is whoever was called so, or the name beside it, or a character of its own."""
        noun, before = token.text.lower(), self._before("det", "word", "pause", "filler", *LOOKS)
        after = [t for t in self.coming if t.kind != "called"][:3]
        kinds = [t.kind for t in after]
        if before.kind == "name":
            self.tags_of[noun], token.tags = before.tags[0], before.tags
            self._describe(before.tags[0])
        elif kinds[:1] == ["name"] or kinds in (["pause", "name"], ["pause", "name", "pause"]):
            self.tags_of[noun] = self._tag(after[kinds.index("name")].text)
        else:
            self._mention(token, self._tag(noun))
        if token.value != "any":
            self.said.setdefault(self.tags_of[noun], token.value)

    def _mention(self, token: _Token, *tags: str) -> None:
        """Somebody is named: as one who will act, or as one acted upon."""
        before = self._before("det", *LOOKS)
        joins = before.text.lower() in ("with", "beside") and self.doers and self.beat.actors
        acted_on = (
            (before.kind == "prep" and self.clause[:1] != [before])  # `with Bo, Ada ...` begins a clause
            or (before.kind == "action" and "action" not in self.ahead)  # `there stands Ada`
            or (before.kind == "word" and any(t.tags for t in self.clause))
        )
        token.tags = tags
        for tag in tags:
            self.recent = [*(t for t in self.recent if t != tag), tag]
            self._describe(tag)
            self.beat.actors.setdefault(tag, self.beat.actors.get(self.doers[-1]) if joins else None)
        if acted_on:
            self.beat.objects |= set(tags) - set(self.doers) - set(self.waiting)
        else:
            self.waiting += [t for t in tags if t not in self.waiting]
        if tags and "position" in self.ahead:
            self.beat.positions[tags[0]] = self.ahead.pop("position").value
        if "action" in self.ahead and self.waiting:
            self._act(self.ahead.pop("action"))

    def _tag(self, name: str) -> str:
        plain = re.sub(r"[^a-z0-9_-]", "", unicodedata.normalize("NFKD", name).lower()).lstrip("0123456789_-")
        first = zlib.crc32(name.encode()) % len(TOY_NAMES)  # for names that leave nothing, or what another has
        wanted = [f"<{word}>" for word in (plain, *TOY_NAMES[first:], *TOY_NAMES[:first]) if word]
        free = [tag for tag in wanted if tag not in self.tags_of.values()] or wanted
        return self.tags_of.setdefault(name.casefold(), free[0])

    def _invent(self) -> str:
        tag = next(f"<{name}>" for name in TOY_NAMES if f"<{name}>" not in self.cast)
        self.cast[tag] = {}
        self.recent.append(tag)
        self.understood.append(f"the text names nobody here, so {tag} plays the part")
        return tag

    def _on_action(self, token: _Token) -> None:
        nouns = [t for t in self.clause if t.kind == "word" and not t.text.endswith("ly")]
        if nouns and self.clause[0].kind == "det" and not any(t.tags for t in self.clause):  # a leaf, the wind
            token.used = nouns[-1].used = not self.names and token.value != "standing"
            if token.used:
                self.past = self.past[: self.past.index(nouns[-1])]
                self._on_name(nouns[-1])
        elif not any(t.tags for t in self.past) and any(t.kind in _PEOPLE for t in self.coming):
            self.ahead["action"] = token
            return
        if token.used:
            self._act(token)

    def _act(self, token: _Token) -> None:
        """Whoever waits to act does; a second action of the same character begins another shot."""
        doers = self.waiting or self.doers or self.recent[-1:] or [self._invent()]
        standing = token.value == "standing"
        if not standing and any(self.beat.actors.get(d) not in (None, "standing", token.value) for d in doers):
            self._cut(dict.fromkeys(doers))
        self.beat.actors |= {d: token.value for d in doers if not (standing and self.beat.actors.get(d))}
        self.doers, self.waiting = doers, []

    def _on_break(self, token: _Token) -> None:
        self._cut({})

    def _on_position(self, token: _Token) -> None:
        acts = any(t.kind == "action" for t in self.clause) and "action" not in self.ahead
        if owners := [t.tags[0] for t in self.clause if t.tags] or (self.doers if acts else []):
            self.beat.positions[owners[-1]] = token.value
        else:  # `on the left, Ada ...`
            self.ahead["position"] = token

    def _on_place(self, token: _Token) -> None:
        old, link = self.beat.setting.get("place"), self._before("det", "word").text.lower()
        goes = link in ("to", "into", "toward", "towards", "reaches")
        if old and not goes and (token.value in _WEATHER or link in ("by", "of", "near", "beside")):
            token.used = old == token.value  # a village by the sea is a village
            return
        if old in _WEATHER and not goes:
            del self.beat.setting["place"]
            for t in self.past:
                t.used = t.used and t.value != old
        self._on_size(token)

    def _on_size(self, token: _Token) -> None:
        """Place, size or camera of the beat; a second one begins another shot of the same actors."""
        if self.beat.setting.get(token.kind, token.value) != token.value:
            self._cut(dict(self.beat.actors))
        self.beat.setting[token.kind] = token.value

    def _on_look(self, token: _Token) -> None:
        """A look is of the name that follows, or else of the name before, unless its owner does something between."""

        def passes(t: _Token, *kinds: str) -> bool:
            return t.kind in ("called", *LOOKS, *kinds) or (t.kind == "word" and not _VERB.search(t.text))

        token.used, is_hat = False, token.kind == "hat"
        if not is_hat and any(t.kind in ("hat", "place") or t.text in ("hat", "cap") for t in self.coming[:1]):
            return  # the hat's own colour, the blue sea
        after = next((t for t in self.coming if not (passes(t) or t.text == "and")), _NONE)
        preceding, small = reversed(self.past), ("det", "filler", "link", "pause")
        before = next((t for t in preceding if t.tags or not (is_hat or passes(t, *small) or t.text == "with")), _NONE)
        if after.kind in ("name", "creature"):
            self.ahead[token.kind] = token
        elif len(before.tags) == 1:
            self._describe(before.tags[0], token)

    _on_camera, _on_group, _on_colour, _on_shape, _on_hat = _on_size, _on_pronoun, _on_look, _on_look, _on_look

    def _describe(self, tag: str, *looks: _Token) -> None:
        """Give a character these looks, or those said ahead; they last through the story: the first word stands."""
        known = self.cast.setdefault(tag, {})
        for look in looks or [self.ahead.pop(kind) for kind in LOOKS if kind in self.ahead]:
            look.used = known.setdefault(look.kind, look.value) == look.value
