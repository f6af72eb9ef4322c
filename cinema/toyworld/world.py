"""The toy world's facts: what exists, what a film of it contains, and how it is put into words.

A look belongs to its movie, not to the name, and is described only at its character's first appearance::

    wide shot, forest. <ada> left, jumping: red round, crown. <bo> right, standing. pan left.
"""

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from cinema.config import TOY, TOY_NAMES
from cinema.story import Character, Place, Shot, Story

# fmt: off
COLOURS = {
    "red": (214, 62, 52), "orange": (240, 145, 44), "yellow": (246, 212, 72), "green": (74, 160, 78),
    "teal": (42, 168, 170), "blue": (62, 98, 214), "purple": (134, 72, 184), "pink": (242, 132, 178),
    "white": (243, 240, 232), "brown": (128, 84, 52),
}
SHAPES = ("round", "square", "triangle", "tall", "diamond", "pear")
HATS = ("bare", "cone", "tophat", "crown", "bow")
PLACES = {  # sky, far layer, ground
    "forest": ((172, 216, 230), (92, 150, 118), (96, 146, 74)),
    "desert": ((250, 222, 168), (232, 178, 116), (222, 176, 104)),
    "city": ((198, 198, 222), (150, 148, 176), (126, 124, 136)),
    "beach": ((150, 208, 240), (72, 148, 196), (238, 216, 156)),
    "snow": ((204, 218, 238), (160, 182, 214), (242, 244, 250)),
    "night": ((32, 38, 84), (52, 58, 110), (46, 72, 78)),
}
# fmt: on
SIZES = {"wide": 0.40, "medium": 0.60, "close": 0.86}  # height of a character, in frame heights
CAMERAS = ("static", "pan left", "pan right", "push in")
ACTIONS = ("standing", "jumping", "swaying", "walking", "waving")
POSITIONS = {"left": 0.5, "center": 1.0, "right": 1.5}  # in frame heights; the frame is 2 wide
FRAMES, FPS = TOY.video.frames, TOY.video.fps

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How a character looks."""

    colour: str
    shape: str
    hat: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}, {self.hat}"

    @property
    def held_out(self) -> bool:
        """True for the fixed tenth of all looks that training never shows."""
        return hashlib.sha256(str(self).encode()).digest()[0] < 26


@dataclass(frozen=True)
class Actor:
    """A character in one shot: where it is and what it does."""

    tag: str
    position: str
    action: str


@dataclass(frozen=True)
class Setup:
    """One shot before it is drawn."""

    place: str
    size: str
    camera: str
    actors: tuple[Actor, ...]


@dataclass(frozen=True)
class SetDesign:
    """A set of one movie: its own palette, horizon, props and sun; lengths are in frame heights."""

    place: str
    sky: RGB
    far: RGB
    ground: RGB
    horizon: float  # from the top
    props: tuple[tuple[float, float, float], ...]  # x, size, and a variant in [0, 1)
    sun: tuple[float, float]  # x, y
    hills: tuple[float, float]  # phase and height of the far layer


@dataclass(frozen=True)
class Movie:
    """A whole toy film: looks by tag, designs by place, shots in order. Everything drawn follows from it."""

    title: str
    cast: dict[str, Look]
    sets: dict[str, SetDesign]
    shots: list[Setup]

    def captions(self, known: Iterable[str] = ()) -> list[str]:
        """One caption a shot; a look is described where its character appears first, unless it is `known` before."""
        lines, seen = list[str](), set(known)
        for shot in self.shots:
            words = [f"{shot.size} shot, {shot.place}."]
            for a in shot.actors:
                words.append(f"{a.tag} {a.position}, {a.action}{'' if a.tag in seen else f': {self.cast[a.tag]}'}.")
                seen.add(a.tag)
            lines.append(" ".join([*words, f"{shot.camera}."]))
        return lines

    def story(self, known: Iterable[str] = ()) -> Story:
        """The movie as a `Story`, without pictures; captions as above."""
        told = zip(self.captions(known), self.shots, strict=True)
        shots = [Shot(caption=line, set=shot.place, duration=FRAMES / FPS) for line, shot in told]
        cast = [Character(tag=tag, description=str(look)) for tag, look in self.cast.items()]
        return Story(title=self.title, cast=cast, sets=[Place(name=p) for p in self.sets], shots=shots)


def all_looks() -> list[Look]:
    """Every look there is: 10 colours x 6 shapes x 5 hats."""
    return [Look(*parts) for parts in product(COLOURS, SHAPES, HATS)]


_ACTOR = re.compile(
    rf"(<[a-z0-9_-]+>) ({'|'.join(POSITIONS)}), ({'|'.join(ACTIONS)})"
    rf"(?:: ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}), ({'|'.join(HATS)}))?\."
)
_SHOT = re.compile(rf"^({'|'.join(SIZES)}) shot, ({'|'.join(PLACES)})\. (.*?) ?({'|'.join(CAMERAS)})\.$")


def parse_caption(text: str) -> tuple[Setup, dict[str, Look]]:
    """Read a caption back: the setup and the looks it describes; ValueError for text in another language."""
    shot = _SHOT.match(text)
    if not shot or _ACTOR.sub("", shot[3]).strip():
        raise ValueError(f"not a shot-list caption: {text!r}; see cinema.toyworld.world for the form")
    found = _ACTOR.findall(shot[3])
    looks = {tag: Look(*look) for tag, _, _, *look in found if look[0]}
    return Setup(shot[2], shot[1], shot[4], tuple(Actor(*told[:3]) for told in found)), looks


def sample_set(place: str, rng: random.Random) -> SetDesign:
    """A set of this kind with a palette and props of its own."""
    sky, far, ground = (clamp(v + rng.randint(-14, 14) for v in colour) for colour in PLACES[place])
    slots, horizon = rng.sample(range(8), 5), rng.uniform(0.52, 0.66)
    props = sorted((s / 4 + rng.uniform(0.02, 0.23), rng.uniform(0.22, 0.40), rng.random()) for s in slots)
    sun, hills = (rng.uniform(0.2, 1.8), rng.uniform(0.12, 0.26)), (rng.uniform(0, 6.28), rng.uniform(0.05, 0.12))
    return SetDesign(place, sky, far, ground, horizon, tuple(props), sun, hills)


def sample_movie(seed: int | str, shots: int, looks: str = "train", returns: bool = False) -> Movie:
    """A random movie, the same for the same seed, independent of other seeds' movies.

    Of `looks`, "train" leaves the held-out tenth aside, "unseen" uses only it, "all" uses every one. One that `returns`
    ends on a shot of whoever appeared first, after an absence (a flashback, for retrieval).
    """
    rng = random.Random(f"toyworld/{seed}")
    cast = _sample_cast(rng.choice((2, 3, 3, 4)), looks, rng)
    sets = {p: sample_set(p, rng) for p in rng.sample(list(PLACES), rng.choice((2, 3)))}
    place, line = rng.choice(list(sets)), list[Setup]()
    for _ in range(shots):
        place = rng.choice(list(sets)) if rng.random() < 0.3 else place
        line.append(_sample_setup(place, list(cast), rng))
    if returns and shots > 2:
        absent = line[0].actors[0].tag
        line[1:-1] = [_sample_setup(s.place, [t for t in cast if t != absent], rng) for s in line[1:-1]]
        line[-1] = Setup(line[0].place, "medium", "static", (Actor(absent, "center", "standing"),))
    return Movie(f"Toy film {seed}", cast, sets, line)


def sample_flashback(seed: int | str, shots: int = 6) -> Movie:
    """A random movie of four scenes of so many shots, each with a set and two characters of its own.

    The last one, from shot 3 `shots` on, goes back to the first or the second.
    """
    rng = random.Random(f"toyworld/flashback/{seed}")
    cast = _sample_cast(6, "train", rng)
    scenes = [(sample_set(p, rng), list(cast)[2 * i : 2 * i + 2]) for i, p in enumerate(rng.sample(list(PLACES), 3))]
    scenes.append(scenes[rng.randrange(2)])
    line = [_sample_setup(design.place, tags, rng) for design, tags in scenes for _ in range(shots)]
    return Movie(f"Flashback {seed}", cast, {design.place: design for design, _ in scenes}, line)


def _sample_cast(count: int, looks: str, rng: random.Random) -> dict[str, Look]:
    """So many characters; no colour twice, as there are enough."""
    pool = [x for x in all_looks() if looks == "all" or x.held_out == (looks == "unseen")]
    cast = dict[str, Look]()
    for name in rng.sample(TOY_NAMES, count):
        cast[f"<{name}>"] = rng.choice([x for x in pool if x.colour not in {c.colour for c in cast.values()}])
    return cast


def _sample_setup(place: str, tags: list[str], rng: random.Random) -> Setup:
    count = min(len(tags), rng.choices((1, 2, 3), (0.56, 0.36, 0.08))[0])
    size = rng.choice({1: ("wide", "medium", "close"), 2: ("wide", "medium"), 3: ("wide",)}[count])
    spots = rng.sample(list(POSITIONS), count) if size != "medium" or count == 1 else rng.sample(("left", "right"), 2)
    actors = tuple(Actor(t, p, rng.choice(ACTIONS)) for t, p in zip(rng.sample(tags, count), spots, strict=True))
    return Setup(place, size, rng.choice(CAMERAS), actors)


def clamp(channels: Iterable[float]) -> RGB:
    """Three numbers as a colour."""
    r, g, b = (max(0, min(255, round(v))) for v in channels)
    return r, g, b
