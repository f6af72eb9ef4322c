"""Reading plain English: a storyline becomes beats, each saying who does what, where, and how it is seen.

A small deterministic reader that knows only what the toy world can draw. It keeps account of the words it used
and of those it could make nothing of.
"""

import re
import textwrap
import unicodedata
import zlib
from dataclasses import dataclass, field

from cinema.config import TOY_NAMES
from cinema.errors import UserError

MAX_CAST = 100

# kind: what it is = what people write for it / ... `+` stands for the endings of a verb, `~` for those of one in e.
# Kinds are tried from top to bottom, so phrases come before words.
_LEXICON = r"""
denied: not = (?:not|never|cannot|\w+n['’]t)(?: \w+)?
camera: pan left = (?:slow )?pan(?:s|ning)?(?: \w+ly)?(?: to the)? left|camera (?:\w+ ){1,4}left
camera: pan right = (?:slow )?pan(?:s|ning)?(?: \w+ly)?(?: to the)? right|camera (?:\w+ ){1,4}right
camera: push in = (?:push|zoom|doll)(?:e?s|ing|y|ies)?(?: \w+ly)? in|camera (?:\w+ ){1,2}(?:in|closer|nearer)
camera: static = static|(?:still|fixed|locked) camera|camera (?:\w+ ){0,2}(?:still|rests|holds|stays|waits)
size: wide = wide(?: shot| view| angle)?|(?:long|establishing) shot|panorama|far (?:away|off)|in the distance
size: wide = from (?:afar|far away|a distance|above) / medium = (?:medium|mid)[ -]shot|medium|waist[ -]up
size: close = (?:extreme )?close[ -]?ups?|close (?:shot|on)|up close|from (?:close|nearby)|portrait
hat: bare = bare(?:[ -]?headed)?|hatless|(?:no|without an?y?) (?:hat|crown|bow|cap)
hat: cone = (?:wizard|witch|party|pointed|pointy)(?:['’]s)? (?:hat|cap)|cones? / tophat = top[ -]?hats?|stovepipe
hat: crown = crown(?:s|ed)?|tiara|diadem|coronet / bow = (?:hair )?ribbons?|bow(?: tie)?
place: forest = forests?|woods?|woodlands?|jungle|grove|glade|trees
place: desert = deserts?|dunes?|sahara|cact(?:us|i)|oasis|canyon
place: city = cit(?:y|ies)|(?:town|market) square|towns?|streets?|village|skyline|rooftops?|downtown
place: beach = beach(?:es)?|shores?|seaside|seashore|coast|sea|ocean|harbou?r
place: snow = snow(?:y|fields?|fall|s|ing)?|wint(?:er|ry)|ic[ey](?! cream)|frozen|tundra|arctic|glacier|blizzard
place: night = night(?:s|fall|time)?|midnight|moon(?:light|lit|rise)?|star(?:s|light|lit|ry)|after dark|darkness
shape: round = round|circular|circle|chubby|plump / square = square|boxy|blocky / tall = tall|lanky|slender
shape: triangle = triang(?:le|ular) / diamond = diamond(?:-shaped)?|kite-shaped / pear = pear(?:-shaped)?
colour: red = red|scarlet|crimson|ruby / orange = orange|amber|tangerine / yellow = yellow|golden|gold|lemon
colour: green = green|emerald|lime / teal = teal|turquoise|cyan / blue = blue|azure|navy|indigo / white = white|ivory
colour: purple = purple|violet|lilac|lavender / pink = pink|rosy|magenta / brown = brown|chestnut|chocolate
position: left = (?:on|to|at|from|in) (?:the |her |his |their )?(?:far )?left(?:[ -]hand)?(?: side)?(?: of)?
position: right = (?:on|to|at|from|in) (?:the |her |his |their )?(?:far )?right(?:[ -]hand)?(?: side)?(?: of)?
position: left = left(?=, \w+ing) / right = right(?=, \w+ing) / center = cent(?:re|er)(?=, \w+ing)
position: center = (?:in|at) the (?:very )?(?:cent(?:re|er)|middle)(?: of)?|between them
action: jumping = (?:jump|leap|skip)+|leapt|hop(?:s|ped|ping)?|bounc~
action: swaying = (?:sway|twirl|spin|waltz)+|danc~|rock(?:ed|ing)|swing(?:s|ing)?
action: walking = (?:walk|stroll|wander|march|enter|trudg|return|climb|travel|follow|cross|run|step)+|(?:hik|tiptoe)~
action: walking = (?:chas|rac|com|arriv)~|go(?:es|ing)?|went|came|ran|heads|leaving|(?<!the )leaves|left(?= the| for)
action: waving = (?<!the )(?<!of )wav~|(?:greet|beckon)+|salut~|bow(?:s|ed|ing)|(?:say(?:s|ing)?|said) (?:hello|\w*bye)
action: standing = (?:stand|wait|rest|look|watch|listen|meet|sleep|stay|sit|stop)+|stood|met|sees?|saw|finds?|found
action: standing = (?:gaz|smil|paus|star)~
group: 2 = they|them|both|the two|the pair|the friends|each other|two (?:friends|strangers|creatures|children)
group: 3 = (?:all |the )three(?: friends)?|everyone|everybody|three (?:friends|strangers|creatures|children)
pronoun: she = she / he = he / it = it / him = him / her = her(?=[.,;!?]|$| and\b)
creature: it = fox|bear|cat|dog|rabbit|hare|bird|owl|mouse|wolf|dragon|robot|frog|duck|penguin|giant|ghost
creature: she = witch|girl|woman|lady|queen|princess|sister|mother|grandmother
creature: he = wizard|boy|man|fellow|gentleman|king|prince|brother|father|grandfather|fisherman
creature: - = knight|child|pirate|sailor|stranger|traveller|clown|dancer|baker
break: - = then|afterwards?|later|next|finally|soon|at last
link: - = and|but|while|when|as|so|until
pause: - = [,:;&—–]|-(?= )
called: - = called|named
prep: - = at|to|with|beside|near|toward|towards|by|into|behind|past|for|reach(?:es)?
det: - = the|an?|some|his|her|its|their|every|this|that|these|those|one|two|three|another|my|our
filler: - = ['’]s|is|was|are|were|be|been|has|have|had|who|which|there|here|in|on|of|from|through|across|over|under
filler: - = around|back|up|down|out|again|together|too|also|very|wear(?:s|ing)?|wore|dressed|now|once|upon|time|away
filler: - = along|camera|shot|scene|cut|deep|falls
"""
_NOT_NAMES = re.compile(
    "i|we|you|it|what|why|how|where|if|after|before|suddenly|meanwhile|nothing|something|nobody|somebody|rain|wind|sun"
    "|thunder|morning|evening|dawn|dusk|noon|today|tomorrow|yesterday|spring|summer|autumn|(?:mon|tues|wednes|thurs|fri"
    "|satur|sun)day|mrs?|ms|dr|captain|old|little|big|no|yes|oh|well|good|hello|goodbye|music|high"
)
_WHERE = re.compile("in|into|at|from|through|of|on|over|across|around|towards?|to|under")
_VERB = re.compile(r"^\w{2,}(?:s|ed|ing)$")  # looks like a verb, when it is no word of ours
_WHO = ("name", "pronoun", "creature", "group")
LOOKS = ("colour", "shape", "hat")
_OF_THE_WORLD = ("place", "size", "camera", "position", "action", *LOOKS)
_WEATHER = ("snow", "night")  # these give way to a set that is a place: a moonlit forest is a forest


@dataclass
class _Token:
    kind: str
    value: str
    text: str
    start: int
    end: int
    used: bool
    tags: tuple[str, ...] = ()  # whom it names


@dataclass
class Beat:
    """What a sentence, or a part of one, says of one shot; whatever is missing the text leaves open."""

    actors: dict[str, str | None] = field(default_factory=dict)  # tag -> action, in order of mention
    objects: set[str] = field(default_factory=set)  # those whom others act upon; a close shot leaves them out
    positions: dict[str, str] = field(default_factory=dict)
    setting: dict[str, str] = field(default_factory=dict)  # place, size, camera


def _lexicon() -> list[tuple[str, str, str]]:
    """(kind, value, expression) of every entry, the verbs' endings written out."""
    entries = []
    for kind, line in (line.split(": ", 1) for line in _LEXICON.strip().splitlines()):
        for value, words in (entry.split(" = ", 1) for entry in line.split(" / ")):
            words = words.replace(")+", r")(?:e?s|\w?ed|\w?ing)?").replace("~", "(?:e[sd]?|ing)")
            entries.append((kind, value, words))
    return entries


_ENTRIES = _lexicon()


def _pattern(names: set[str]) -> re.Pattern[str]:
    """One pattern for everything: the names first, then group e0, e1, ... for each entry, unknown words last."""
    edges = [("", "") if kind == "pause" else (r"\b", r"(?!\w)") for kind, _, _ in _ENTRIES]
    parts = [f"(?P<e{n}>{a}(?:{_ENTRIES[n][2]}){z})" for n, (a, z) in enumerate(edges)]
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    name = rf"(?-i:(?P<name><(?:{known.lower()})>|\b(?:{known})(?!\w)))"
    return re.compile("|".join([name, *parts, r"(?P<word>[^\W_][\w-]*)"]), re.IGNORECASE)


def _entry(match: re.Match[str]) -> tuple[str, str]:
    """Kind and value of a match."""
    group = match.lastgroup or "word"
    return (group, match[0]) if group in ("name", "word") else _ENTRIES[int(group[1:])][:2]


def _tokens(text: str, pattern: re.Pattern[str]) -> list[_Token]:
    found: list[_Token] = []
    for match in pattern.finditer(text):
        kind, value = _entry(match)
        if kind == "name" and found and found[-1].kind == kind and match.start() - found[-1].end == 1:
            found[-1].end = match.end()  # a surname
            continue
        found.append(_Token(kind, value, match[0], *match.span(), used=kind not in ("word", "denied")))
    return found


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
            if not word[0].isupper() or _NOT_NAMES.fullmatch(word.lower()):
                continue
            if word.lower() in TOY_NAMES:
                names.add(word)
            elif _kind(plain, word) in ("word", ""):
                acts = _kind(plain, after) == "action" or (_VERB.search(after) and not word.endswith("s"))
                if acts or (before and not _WHERE.fullmatch(before.lower())):
                    names.add(word)
    return names


def _kind(pattern: re.Pattern[str], word: str) -> str:
    match = pattern.fullmatch(word)
    return _entry(match)[0] if match else ""


class StorylineReader:
    """Reads a storyline into beats; every kind of token has a handler, called `_on_kind`.

    Attributes:
        heading: a heading line of the text, if it has one.
        beats: what happens, in order.
        cast: tag of each character -> what the text says of the look, by colour, shape and hat.
        understood, left_out: per sentence, words that were used and words that were not.

    Raises:
        UserError: the text says nothing that the toy world knows, or names too many characters.
    """

    def __init__(self, text: str) -> None:
        self.heading, self.sentences = _sentences(text)
        self.names = _names(self.sentences)
        if len(self.names) > MAX_CAST:
            raise UserError(f"the storyline names {len(self.names)} characters; a story has {MAX_CAST} at most")
        self.pattern = _pattern(self.names)
        self.cast: dict[str, dict[str, str]] = {}  # tag -> what the text says of the look
        self.recent: list[str] = []  # tags, last mentioned last
        self.doers: list[str] = []  # who acted last
        self.said: dict[str, str] = {}  # tag -> she, he or it
        self.nouns: dict[str, str] = {}  # "fox" -> tag
        self.beats: list[Beat] = []
        self.understood: list[str] = []
        self.left_out: list[str] = []
        for number, sentence in enumerate(self.sentences, 1):
            self._read(number, sentence)
        if not self.beats:
            raise UserError("the storyline names no set, character or action that I know; say who does what and where")
        if not self.cast:
            self._invent()

    def _read(self, number: int, text: str) -> None:
        self.tokens, self.beat = _tokens(text, self.pattern), Beat()
        self.waiting: list[str] = []  # named, and yet to act
        self.ahead: dict[str, _Token] = {}  # said of whoever is named next
        for i, token in enumerate(self.tokens):
            if handle := getattr(self, f"_on_{token.kind}", None):
                handle(i, token)
        self._end()
        told = [t for t in self.tokens if t.used and (t.tags or t.kind in _OF_THE_WORLD)]
        if told:
            listed = "; ".join(f"“{t.text}” = {', '.join(t.tags) or t.value}" for t in told)
            self.understood.append(f"sentence {number}: {listed}")
        if unused := self._unused(text):
            self.left_out.append(f"sentence {number}: " + "; ".join(f"“{group}”" for group in unused))

    def _unused(self, text: str) -> list[str]:
        """Words nothing was made of, with the small words between them."""
        spans: list[list[int]] = []
        together = False
        for t in self.tokens:
            if not t.used and together:
                spans[-1][1] = t.end
            elif not t.used:
                spans.append([t.start, t.end])
            together = not t.used or (together and t.kind in ("det", "prep", "filler", "link"))
        return [text[start:end] for start, end in spans]

    def _end(self) -> None:
        """The end of a sentence: what was kept for a later name finds its owner or is left out."""
        if action := self.ahead.pop("action", None):
            self._act(action)
        if (position := self.ahead.pop("position", None)) and self.beat.actors:
            self.beat.positions.setdefault(list(self.beat.actors)[-1], position.value)
        for token in self.ahead.values():
            token.used = False
        self.doers = self.waiting or self.doers
        if self.beat.actors or self.beat.setting:
            self.beats.append(self.beat)

    def _cut(self, keep: dict[str, str | None]) -> None:
        """Begin another shot within the sentence, with these actors; who only just came leaves the old one."""
        for tag in keep:
            if self.beat.actors.get(tag, "") is None and len(self.beat.actors) > 1:
                del self.beat.actors[tag]
        self.beats.append(self.beat)
        self.beat = Beat(dict(keep))

    # --- who ---

    def _on_name(self, i: int, token: _Token) -> None:
        self._mention(i, self._tag(token.text))

    def _on_pronoun(self, i: int, token: _Token) -> None:
        acts = self.tokens[i + 1 : i + 2] and self.tokens[i + 1].kind == "action"
        if token.value == "it" and not acts and "it" not in self.said.values():
            return  # `it is cold` is about nobody
        sex = {"him": "he", "her": "she"}.get(token.value, token.value)
        busy = self.doers + self.waiting if sex != token.value or (sex == "it" and not acts) else []
        others = [t for t in reversed(self.recent) if t not in busy]
        fitting = [t for t in others if self.said.get(t, sex) == sex] or others or self.recent[-1:]
        tag = fitting[0] if fitting else self._invent()
        self.said.setdefault(tag, sex)
        self._mention(i, tag)

    def _on_group(self, i: int, token: _Token) -> None:
        count = int(token.value)
        while not self.names and len(self.cast) < count and (not self.cast or token.text[:2].lower() in ("tw", "th")):
            self._invent()
        others = [t for t in self.recent if token.text.lower() != "them" or t not in self.doers + self.waiting]
        self._mention(i, *sorted(others[-count:], key=list(self.cast).index))

    def _on_creature(self, i: int, token: _Token) -> None:
        """`the fox` is whoever was called so, or the name beside it, or a character of its own."""
        before = self._before(i, ("det", "word", *LOOKS))
        apart = before and before.kind in ("pause", "filler") and self._before(self.tokens.index(before), ())
        owner = next((t for t in (before, apart) if t and t.kind == "name"), None)
        noun, after = token.text.lower(), next((t for t in self.tokens[i + 1 :] if t.kind != "called"), None)
        if owner:
            self.nouns[noun], token.tags = owner.tags[0], owner.tags
            self._describe(owner.tags[0])
        elif after and (after.kind == "name" or (after.kind == "pause" and self._is_aside(i + 2))):
            self.nouns[noun] = self._tag(after.text if after.kind == "name" else self.tokens[i + 2].text)
        else:
            self._mention(i, self.nouns.setdefault(noun, self._tag(noun)))
        if token.value != "-":
            self.said.setdefault(self.nouns[noun], token.value)

    def _is_aside(self, i: int) -> bool:
        """A name between two pauses: `the sailor, Otto, ...`."""
        ends = i + 1 >= len(self.tokens) or self.tokens[i + 1].kind == "pause"
        return ends and self.tokens[i : i + 1] != [] and self.tokens[i].kind == "name"

    def _mention(self, i: int, *tags: str) -> None:
        """Somebody is named: as one who will act, or as one acted upon."""
        self.tokens[i].tags = tags
        before = self._before(i, ("det", *LOOKS))
        joins = before is not None and before.text.lower() in ("with", "beside") and self.doers and self.beat.actors
        for tag in tags:
            self.cast.setdefault(tag, {})
            self.recent = [*(t for t in self.recent if t != tag), tag]
            self._describe(tag)
            self.beat.actors.setdefault(tag, self.beat.actors.get(self.doers[-1]) if joins else None)
        if before and self._acted_on(i, before):
            self.beat.objects |= set(tags) - set(self.doers) - set(self.waiting)
        else:
            self.waiting += [t for t in tags if t not in self.waiting]
        if "position" in self.ahead:
            self.beat.positions[tags[0]] = self.ahead.pop("position").value
        if "action" in self.ahead and self.waiting:
            self._act(self.ahead.pop("action"))

    def _acted_on(self, i: int, before: _Token) -> bool:
        clause = self._clause(i)
        if before.kind == "prep":
            return clause[:1] != [before]  # `with Bo, Ada ...` begins a clause
        if before.kind == "action":
            return "action" not in self.ahead  # `there stands Ada`
        return before.kind == "word" and any(t.tags for t in clause)

    def _tag(self, name: str) -> str:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().strip("<>")
        plain = re.sub(r"[^a-z0-9_-]", "", plain).lstrip("0123456789_-")
        return f"<{plain}>" if plain else f"<{TOY_NAMES[zlib.crc32(name.encode()) % len(TOY_NAMES)]}>"

    def _invent(self) -> str:
        tag = next(t for t in (f"<{n}>" for n in TOY_NAMES) if t not in self.cast)
        self.cast[tag] = {}
        self.recent.append(tag)
        self.understood.append(f"the text names nobody here, so {tag} plays the part")
        return tag

    # --- what they do ---

    def _on_action(self, i: int, token: _Token) -> None:
        clause = self._clause(i)
        nouns = [t for t in clause if t.kind == "word" and not t.text.endswith("ly")]
        if any(t.tags for t in clause):
            self._act(token)
        elif nouns and clause[0].kind == "det":  # somebody unknown acts: a leaf, the wind
            if self.names or token.value == "standing":
                token.used = False
                return
            nouns[-1].used = True
            self._mention(self.tokens.index(nouns[-1]), self._tag(nouns[-1].text))
            self._act(token)
        elif not any(t.tags for t in self.tokens[:i]) and any(t.kind in _WHO for t in self.tokens[i:]):
            self.ahead["action"] = token
        else:
            self._act(token)

    def _act(self, token: _Token) -> None:
        """Whoever waits to act does; a second action of the same character begins another shot."""
        doers = self.waiting or self.doers or self.recent[-1:] or [self._invent()]
        standing = token.value == "standing"
        if not standing and any(self.beat.actors.get(d) not in (None, "standing", token.value) for d in doers):
            self._cut(dict.fromkeys(doers))
        for tag in doers:
            if not (standing and self.beat.actors.get(tag)):
                self.beat.actors[tag] = token.value
        self.doers, self.waiting = doers, []

    def _on_break(self, i: int, token: _Token) -> None:
        if self.beat.actors:
            self._cut({})

    def _on_position(self, i: int, token: _Token) -> None:
        clause = self._clause(i)
        named = [t.tags[0] for t in clause if t.tags]
        acting = self.doers if any(t.kind == "action" for t in clause) and "action" not in self.ahead else []
        if named or acting:
            self.beat.positions[(named or acting)[-1]] = token.value
        else:  # `on the left, Ada ...`
            self.ahead["position"] = token

    # --- where, and how it is seen ---

    def _on_place(self, i: int, token: _Token) -> None:
        old, before = self.beat.setting.get("place"), self._before(i, ("det", "word"))
        link = before.text.lower() if before else ""
        goes = link in ("to", "into", "toward", "towards", "reaches")
        if old and not goes and (token.value in _WEATHER or link in ("by", "of", "near", "beside")):
            token.used = old == token.value  # a village by the sea is a village
        elif old in _WEATHER and not goes:
            self.beat.setting["place"] = token.value
            for t in self.tokens[:i]:
                t.used = t.used and t.value != old
        else:
            self._set(i, token)

    def _set(self, i: int, token: _Token) -> None:
        """Place, size or camera of the beat; a second one begins another shot of the same actors."""
        old = self.beat.setting.get(token.kind)
        if old not in (None, token.value) and self.beat.actors:
            self._cut(dict(self.beat.actors))
        self.beat.setting[token.kind] = token.value

    _on_size = _on_camera = _set

    # --- how they look ---

    def _on_look(self, i: int, token: _Token) -> None:
        following = self.tokens[i + 1] if i + 1 < len(self.tokens) else None
        if (
            following
            and token.kind != "hat"
            and (following.kind in ("hat", "place") or following.text in ("hat", "cap"))
        ):
            token.used = False  # the hat's own colour, the blue sea
        elif self._leads_to_name(i):
            self.ahead[token.kind] = token
        elif owner := self._described(i):
            self._give(owner, token)
        else:
            token.used = False

    _on_colour = _on_shape = _on_hat = _on_look

    def _leads_to_name(self, i: int) -> bool:
        for t in self.tokens[i + 1 :]:
            if t.kind in ("name", "creature"):
                return True
            if not (t.kind in ("called", *LOOKS) or t.text == "and" or (t.kind == "word" and not _VERB.search(t.text))):
                return False
        return False

    def _described(self, i: int) -> str | None:
        """Whom a word of the look behind a name describes: nobody, if the name's owner does something in between."""
        for t in reversed(self.tokens[:i]):
            if t.tags:
                return t.tags[0] if len(t.tags) == 1 else None
            passes = t.kind in ("det", "filler", "link", "pause", "called", *LOOKS) or t.text == "with"
            if not (passes or (t.kind == "word" and not _VERB.search(t.text)) or self.tokens[i].kind == "hat"):
                return None
        return None

    def _describe(self, tag: str) -> None:
        for kind in LOOKS:
            if kind in self.ahead:
                self._give(tag, self.ahead.pop(kind))

    def _give(self, tag: str, token: _Token) -> None:
        """A look is kept through the story: the first word stands."""
        token.used = self.cast.setdefault(tag, {}).setdefault(token.kind, token.value) == token.value

    # --- looking around ---

    def _clause(self, i: int) -> list[_Token]:
        start = max((j + 1 for j in range(i) if self.tokens[j].kind in ("link", "pause", "break")), default=0)
        return self.tokens[start:i]

    def _before(self, i: int, skip: tuple[str, ...]) -> _Token | None:
        return next((t for t in reversed(self.tokens[:i]) if t.kind not in skip), None)
