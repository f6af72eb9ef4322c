"""What the watermark survives, and how often it is seen where it is not; test_provenance.py runs a sample of it.

python tests/watermark.py survive 300 [FOLDER with NAME.work/shots/*.tiff of films that were made]
python tests/watermark.py unmarked 10000 [FOLDER with real films]
"""

import io
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from math import sqrt
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageSequence

from cinema.media import film_writer
from cinema.provenance import FOUND, Watermark, detect
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie

Frames = list[Image.Image]


def jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def scale(image: Image.Image, factor: float) -> Image.Image:
    even = [round(side * factor / 2) * 2 for side in image.size]
    return image.resize((even[0], even[1]), Image.Resampling.BICUBIC)


def crop(image: Image.Image, share: float, x: float = 0.3, y: float = 0.7) -> Image.Image:
    """Cut away that share of each side, at a place between 0 (left, top) and 1."""
    kept = [round(side * (1 - share) / 2) * 2 for side in image.size]
    left, top = round((image.width - kept[0]) * x), round((image.height - kept[1]) * y)
    return image.crop((left, top, left + kept[0], top + kept[1]))


def screenshot(image: Image.Image, rng: random.Random) -> Image.Image:
    """A player's window on a desktop at odd size and place, with a border, as JPEG of quality 80."""
    shown = image.resize((round(image.width * 2.37), round(image.height * 2.37)), Image.Resampling.BILINEAR)
    desktop = Image.new("RGB", (round(shown.width * 1.2), round(shown.height * 1.3)), (43, 51, 62))
    desktop.paste(shown, (rng.randrange(desktop.width - shown.width), rng.randrange(desktop.height - shown.height)))
    return jpeg(desktop, 80)


def film(frames: Frames, crf: int, ending: str = ".mp4") -> Frames:
    """The frames as a codec leaves them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film{ending}"
        with film_writer(path, *frames[0].size, 8, crf) as add:
            for frame in frames:
                add(frame)
        with av.open(str(path)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]


ON_FRAMES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "nothing": lambda image, rng: image,
    "scale 50 %": lambda image, rng: scale(image, 0.5),
    "scale 150 %": lambda image, rng: scale(image, 1.5),
    "crop 20 %": lambda image, rng: crop(image, 0.2, rng.random(), rng.random()),
    "JPEG quality 50": lambda image, rng: jpeg(image),
    "brightness +20 %": lambda image, rng: ImageEnhance.Brightness(image).enhance(1.2),
    "brightness -20 %": lambda image, rng: ImageEnhance.Brightness(image).enhance(0.8),
    "contrast +20 %": lambda image, rng: ImageEnhance.Contrast(image).enhance(1.2),
    "contrast -20 %": lambda image, rng: ImageEnhance.Contrast(image).enhance(0.8),
    "gamma 1.2": lambda image, rng: image.point([round(255 * (v / 255) ** 1.2) for v in range(256)] * 3),
    "gamma 0.8": lambda image, rng: image.point([round(255 * (v / 255) ** 0.8) for v in range(256)] * 3),
    "blur, sigma 1": lambda image, rng: image.filter(ImageFilter.GaussianBlur(1)),
    "screenshot": screenshot,
}
ON_FILMS: dict[str, Callable[[Frames], Frames]] = {
    "H.264, CRF 23": lambda frames: film(frames, 23),
    "H.264, CRF 28": lambda frames: film(frames, 28),
    "H.264, CRF 33": lambda frames: film(frames, 33),
    "VP9, CRF 32": lambda frames: film(frames, 32, ".webm"),
    "every third frame": lambda frames: film(frames, 18)[::3],
    "CRF 28, 75 %, crop 10 %": lambda frames: film([crop(scale(frame, 0.75), 0.1) for frame in frames], 28),
    "one frame of CRF 18": lambda frames: film(frames, 18)[len(frames) // 2 :][:1],
    "one frame of CRF 28": lambda frames: film(frames, 28)[len(frames) // 2 :][:1],
}


def toy_film(seed: object, shots: int = 3, frames: int = 9) -> Frames:
    movie = sample_movie(f"watermark/{seed}", shots)
    return [render(movie, shot, 128, k / (frames - 1)) for shot in movie.shots for k in range(frames)]


def made_films(folder: Path) -> Iterator[Frames]:
    """Films of three shots out of those that were made."""
    for work in sorted(folder.glob("*.work")):
        shots = [Image.open(path) for path in sorted(work.glob("shots/*.tiff"))]
        for i in range(0, len(shots) - 2, 3):
            pages = (ImageSequence.Iterator(shot) for shot in shots[i : i + 3])
            yield [page.convert("RGB") for shot in pages for page in islice(shot, None, None, 2)]


def interval(hits: int, count: int) -> list[float]:
    """Wilson's, 95 %."""
    z, share = 1.96, hits / count
    middle, half = share + z * z / (2 * count), z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [round(100 * (middle + sign * half) / (1 + z * z / count), 1) for sign in (-1, 1)]


def quality(a: Image.Image, b: Image.Image) -> tuple[float, float]:
    """PSNR in decibels, and SSIM of luma in Gaussian windows."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    x, y = (np.asarray(image.convert("L"), float) for image in (a, b))

    def mean(field: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(field, (11, 11), 1.5)

    xx, yy, xy = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2, mean(x * y) - mean(x) * mean(y)
    alike = (2 * mean(x) * mean(y) + 6.5025) / (mean(x) ** 2 + mean(y) ** 2 + 6.5025) * (2 * xy + 58.5225)
    return 10 * np.log10(255**2 / error), float((alike / (xx + yy + 58.5225)).mean())


def survive(films: Iterator[Frames]) -> dict[str, object]:
    """Of every film one frame alone, and the film, are distorted."""
    found, rng, kept = defaultdict(list), random.Random(0), []
    for i, frames in enumerate(films):
        payload = rng.randrange(16**7)
        marked = [Watermark(payload).embed(frame) for frame in frames]
        kept.append(quality(frames[len(frames) // 2], one := marked[len(frames) // 2]))
        seen = {name: [change(one, rng)] for name, change in ON_FRAMES.items()}
        for name, images in (seen | {name: change(marked) for name, change in ON_FILMS.items()}).items():
            heard = detect(images)
            found[name].append((heard.found, heard.found and heard.payload == payload, heard.peak))
        if i % 20 == 19:
            print(
                i + 1, {name: sum(hit for hit, *_ in hits) for name, hits in found.items()}, file=sys.stderr, flush=True
            )
    rows: dict[str, object] = {}
    for name, hits in found.items():
        counts = [sum(hit[k] for hit in hits) for k in (0, 1)]
        rows[name] = {"found": f"{counts[0]} of {len(hits)}", "ci95": interval(counts[0], len(hits))}
        rows[name] |= {"payload": counts[1], "lowest peak": round(min(hit[2] for hit in hits), 1)}
    psnr, ssim = np.array(kept).T
    return rows | {"PSNR": [psnr.mean(), psnr.min()], "SSIM": [ssim.mean(), ssim.min()]}


def unmarked(count: int, folder: Path | None) -> dict[str, object]:
    """Probabilities stated for frames without the mark: of real films in the folder, the rest of the toy world."""
    probabilities, real = [], 0
    for path in sorted(folder.glob("*.mp4")) if folder else []:
        with av.open(str(path)) as container:
            probabilities += [detect([frame.to_image()]).chance for frame in container.decode(video=0)]
    real = len(probabilities)
    for i in range(max(0, count - real)):
        movie = sample_movie(f"unmarked/{i}", 3)
        probabilities.append(detect([render(movie, movie.shots[i % 3], 128, i % 7 / 6)]).chance)
        if i % 200 == 0:
            print(
                real,
                i,
                min(probabilities),
                sum(p < 0.01 for p in probabilities),
                sum(p < 0.1 for p in probabilities),
                file=sys.stderr,
                flush=True,
            )
    p = np.array(probabilities)
    below = {
        str(level): [float((p[:real] < level).mean()), float((p[real:] < level).mean())]
        for level in (0.5, 0.1, 0.01, 0.001)
    }
    return {
        "frames": len(p),
        "real": real,
        "found": int((p <= FOUND).sum()),
        "lowest": p.min(),
        "below, real and toy": below,
    }


if __name__ == "__main__":
    what, count, *places = sys.argv[1:]
    place = Path(places[0]) if places else None
    if what == "survive":
        made = list(made_films(place)) if place else []
        told = {"made": survive(iter(made))} if made else {}
        told["toy"] = survive(toy_film(i) for i in range(int(count) - len(made)))
    else:
        told = unmarked(int(count), place)
    print(json.dumps(told, indent=1))
