"""What a film says of itself: a watermark in every frame; what a file has of that, and of credentials.

The mark is spread-spectrum noise of a public seed. It belongs to the frame, not to its pixels: a frame is always `TILE`
units high, so a scaled frame is the same frame. Axes: `h w` pixels, `y x` offsets in a tile, `n` waves, `g` sizes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import shake_256
from itertools import combinations, islice
from math import erfc, expm1, log1p, prod, sqrt
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from einops import reduce
from jaxtyping import Complex, Float, Int
from PIL import Image, ImageSequence

from cinema.credentials import Credentials, read_credentials
from cinema.errors import UserError

TILE = 128  # units: height of a frame, and period of the pattern
BAND = 5, 22  # waves a tile: lower ones would be seen as blotches, higher ones are what codecs throw away
PRIME, PITCH, SENT, NEEDED = 251, 8, 6, 4  # letters of the alphabet, units between two; letters sent and needed
SYNC = 4  # of SENT + SYNC parts of the waves, those that tell where the tile is
PAYLOADS = 16**7  # a payload is seven hexadecimal digits
RMS, FLOOR, GAIN, CAP = 2.4, 1.0, 0.35, 2.5  # grey levels: 40.5 dB; strength where it is flat, its growth, its limit
BOX = TILE // 14  # units: of what is local
SHARES = 1.012 ** np.arange(-42, 40)  # height of a picture in heights of the marked frame: cropped, or with a border
FOUND = 1e-6  # a false-positive probability that is small enough
FRAMES = 500  # of a film that are read

Grey = Float[np.ndarray, "h w"]


@dataclass(frozen=True)
class Waves:
    """The waves of the pattern: how often each passes a tile, its phase, and what it is for (0: where the tile is)."""

    k: Int[np.ndarray, "n 2"]
    phase: Float[np.ndarray, "n"]
    letter: Int[np.ndarray, "n"]


@cache
def waves() -> Waves:
    """The waves within `BAND`, dealt out at random to letters; random here is a hash, for ever the same."""
    y, x = np.mgrid[-BAND[1] : BAND[1] + 1, 1 : BAND[1] + 1]
    radius = np.hypot(y, x)
    k = np.stack([y, x], -1)[(BAND[0] <= radius) & (radius <= BAND[1])]
    angle, deal = np.frombuffer(shake_256(b"captain cinema").digest(8 * len(k)), "<u4").reshape(2, -1)
    letter = np.argsort(np.argsort(deal)) % (SENT + SYNC) - SYNC + 1
    return Waves(k, angle * (2 * np.pi / 2**32), np.maximum(letter, 0))


def _through(points: Sequence[tuple[int, int]]) -> list[int]:
    """Values at 0 to 5 of the polynomial through these points, over the integers modulo 251 (Lagrange)."""

    def at(x: int) -> int:
        terms = (
            y * prod((x - other) * pow(z - other, -1, PRIME) for other, _ in points if other != z) for z, y in points
        )
        return sum(terms) % PRIME

    return [at(x) for x in range(SENT)]


def spell(payload: int) -> list[int]:
    """The letters of a payload: its four digits, and two more on the cubic through them, a Reed-Solomon code."""
    return _through([(i, payload // PRIME**i % PRIME) for i in range(NEEDED)])


def understand(evidence: Float[np.ndarray, "6 251"]) -> tuple[int, float]:
    """The payload that all six letters say loudest, of those that any four of the likeliest letters spell; how loud."""
    likeliest, heard = evidence.argmax(1).tolist(), {-1: 0.0}
    for known in combinations(range(SENT), NEEDED):
        letters = _through([(x, likeliest[x]) for x in known])
        payload = sum(letter * PRIME**i for i, letter in enumerate(letters[:NEEDED]))
        if payload < PAYLOADS:
            heard[payload] = float(evidence[range(SENT), letters].sum()) / sqrt(SENT)
    return max(heard.items(), key=lambda said: said[1])


@dataclass(frozen=True)
class Watermark:
    """A mark that carries a payload below 16^7, such as seven digits of a digest."""

    payload: int

    @cached_property
    def tile(self) -> Float[np.ndarray, "128 128"]:
        """The pattern, of variance 1: each wave is moved by what its letter says, :eq:`eq-pattern`."""
        own, spectrum = waves(), np.zeros((TILE, TILE // 2 + 1), complex)
        moved = np.array([(0, 0), *(np.multiply(divmod(s, TILE // PITCH), PITCH) for s in spell(self.payload))])
        turn = own.phase - 2 * np.pi / TILE * (own.k * moved[own.letter]).sum(1)
        spectrum[own.k[:, 0], own.k[:, 1]] = np.exp(1j * turn)
        return (np.fft.irfft2(spectrum) * TILE**2 / sqrt(2 * len(turn))).astype(np.float32)

    def embed(self, image: Image.Image) -> Image.Image:
        """The picture with the mark in it, stronger where there is more to see, :eq:`eq-embed`."""
        frame = np.asarray(image.convert("RGB"), np.float32)
        high, wide = frame.shape[:2]
        pattern = np.tile(self.tile, (1, -(-wide // high)))
        if high != TILE:
            pattern = cv2.resize(pattern, (high * -(-wide // high), high), interpolation=cv2.INTER_CUBIC)
        luma = grey(frame)
        strength = np.minimum(FLOOR + GAIN * _deviation(luma - _mean(luma)), CAP)
        strength *= RMS / sqrt(np.square(strength).mean())
        marked = frame + (strength * pattern[:, :wide])[..., None]
        return Image.fromarray(np.clip(np.rint(marked), 0, 255).astype(np.uint8))


def grey(frame: Float[np.ndarray, "h w 3"]) -> Grey:
    """Luma of BT.709."""
    return frame @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def _mean(field: Grey) -> Grey:
    side = max(3, BOX * field.shape[0] // TILE) | 1
    return cv2.blur(field, (side, side))


def _deviation(field: Grey) -> Grey:
    return np.sqrt(np.maximum(_mean(field * field), 0))


def whiten(image: Image.Image) -> Grey:
    """What is left of a picture without what is local to it, its mean and its contrast, :eq:`eq-whiten`."""
    luma = grey(np.asarray(image.convert("RGB"), np.float32))
    high, wide = luma.shape[0], min(luma.shape[1], 16 * luma.shape[0])
    luma = luma[:, :wide]  # a line of a million pixels is no picture
    if high > 2 * TILE:
        luma = cv2.resize(luma, (max(1, round(2 * TILE * wide / high)), 2 * TILE), interpolation=cv2.INTER_AREA)
    rest = luma - _mean(luma)
    return rest / (_deviation(rest) + 0.5)  # half a level is rounding


def listen(residual: Grey, share: float) -> Complex[np.ndarray, "n"]:
    """Directions in which the waves point in a picture `share` frames high, its tiles laid upon one another."""
    high, wide = residual.shape
    size = max(1, round(TILE * share * wide / high)), max(1, round(TILE * share))
    small = cv2.resize(residual, size, interpolation=cv2.INTER_AREA if size[1] < high else cv2.INTER_LINEAR)
    whole = cv2.copyMakeBorder(small, 0, -size[1] % TILE, 0, -size[0] % TILE, cv2.BORDER_CONSTANT, value=0)
    tile = reduce(whole, "(a y) (b x) -> y x", "sum", y=TILE, x=TILE)
    heard = np.fft.fft(np.fft.rfft(tile)[:, : BAND[1] + 1], axis=0)[*waves().k.T]
    return heard / (np.abs(heard) + 1e-9)


def correlate(heard: Complex[np.ndarray, "n"], letter: int = 0) -> Float[np.ndarray, "y x"]:
    """How well the waves of a letter agree with each offset of the tile, in standard deviations, :eq:`eq-correlate`.

    Of a picture without the mark, whatever it shows, each is a sum of cosines of random angles: mean 0, variance 1.
    """
    own, spectrum = waves(), np.zeros((TILE, BAND[1] + 1), np.complex64)
    mine = own.letter == letter
    spectrum[*own.k[mine].T] = heard[mine] * np.exp(-1j * own.phase[mine])
    return np.fft.irfft(np.fft.ifft(spectrum, axis=0), TILE) * (TILE**2 / sqrt(2 * mine.sum()))


def chance(peak: float, trials: int = TILE**2 * len(SHARES)) -> float:
    """How probably the highest of so many independent normal values is `peak` or more, :eq:`eq-chance`."""
    return -expm1(trials * log1p(-erfc(peak / sqrt(2)) / 2))


@dataclass(frozen=True)
class Detection:
    """The best place for a mark in a picture or film, and what it says there."""

    peak: float  #: standard deviations
    share: float  #: the picture's height in heights of the marked frame
    offset: tuple[int, int]  #: of its upper left corner in the tile, units, down and right
    payload: int | None  #: None if it cannot be made out

    @property
    def chance(self) -> float:
        """How probable so high a peak is where there is no mark."""
        return chance(self.peak)

    @property
    def found(self) -> bool:
        """Whether that is at most one in a million."""
        return self.chance <= FOUND


def detect(images: Iterable[Image.Image]) -> Detection:
    """Look for the mark in a picture, or in frames of one size, whose evidence is added; ValueError for no frame."""
    residual = sum(map(whiten, images), np.zeros((), np.float32))
    if not residual.ndim:
        raise ValueError("there is no frame to look at")
    heard = [listen(residual, share) for share in SHARES]
    maps = [correlate(own) for own in heard]
    best = int(np.argmax([z.max() for z in maps]))
    down, right = divmod(int(maps[best].argmax()), TILE)
    letters = (correlate(heard[best], i + 1) for i in range(SENT))
    said = [np.roll(z, (-down, -right), (0, 1))[::PITCH, ::PITCH].ravel()[:PRIME] for z in letters]
    payload, loud = understand(np.stack(said))
    sure = chance(loud, PRIME**NEEDED) < 1e-3  # that no other message is as loud by chance
    offset = -down % TILE, -right % TILE
    return Detection(float(maps[best].max()), float(SHARES[best]), offset, payload if sure else None)


@dataclass(frozen=True, kw_only=True)
class Verdict(Credentials):
    """What a file says of itself, as `cinema verify` prints it."""

    file: str
    watermark: bool
    false_positive_probability: float
    payload: str | None  #: seven hexadecimal digits


def verify(path: Path, trusted: Sequence[Path] = ()) -> Verdict:
    """Look for watermark and credentials in a picture or film; UserError if it is neither, or nothing can be read."""
    found, credentials = _look(path), vars(read_credentials(path, trusted))
    payload = f"{found.payload:07x}" if found.found and found.payload is not None else None
    watermark: dict[str, Any] = {"watermark": found.found, "false_positive_probability": found.chance}
    return Verdict(file=str(path), payload=payload, **watermark, **credentials)


def _look(path: Path) -> Detection:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a picture or a film")
    for read in (_pages, _frames):
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError, av.FFmpegError):
            return detect(islice(read(path), FRAMES))
    raise UserError(f"{path}: no picture of it can be read; give a picture or a film that is whole")


def _pages(path: Path) -> Iterator[Image.Image]:
    with Image.open(path) as image:
        yield from (page.convert("RGB") for page in ImageSequence.Iterator(image))


def _frames(path: Path) -> Iterator[Image.Image]:
    """Frames of a film, up to where it is damaged."""
    with av.open(str(path)) as container, suppress(av.FFmpegError):
        yield from (frame.to_image() for frame in container.decode(video=0))
