"""Toy films that are as hard to cut as real ones. Two hundred, to be compared by `cinema bench curate FOLDER`:

python tests/trials.py 200 FOLDER
"""

import random
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np

from cinema.toyworld.film import write_film
from cinema.toyworld.world import sample_movie

CODECS = {"libx264": ".mp4", "mpeg4": ".avi", "libvpx-vp9": ".webm"}


def write_trials(count: int, seed: int, out: Path, shots: int = 8) -> list[Path]:
    """Write toy films with all transitions, titles, letterbox, grain, three codecs and rate factors 18 to 32."""
    films = []
    for i in range(count):
        rng = random.Random(f"trial/{seed}/{i}")
        movie, (codec, ending) = sample_movie(f"trial/{seed}/{i}", shots), list(CODECS.items())[i % len(CODECS)]
        clean, path = out / f"trial-{seed}-{i:03d}-clean.mp4", out / f"trial-{seed}-{i:03d}{ending}"
        truth = write_film(movie, clean, crf=4, transitions=True, titles=True, letterbox=rng.choice((0, 12, 16, 22)))
        roughen(clean, path, codec, rng.choice((0, 3, 6)), rng.randint(18, 32))
        truth.rename(path.with_suffix(".json"))
        clean.unlink()
        films.append(path)
    return films


def roughen(film: Path, path: Path, codec: str, grain: int, crf: int) -> None:
    """Encode a film again, with grain of this standard deviation (of 255) on the luma of its picture area."""
    rng, options = np.random.default_rng(0), {"crf": str(crf)}
    if codec == "mpeg4":
        options = {"qmin": str(crf // 5), "qmax": str(crf // 5)}
    elif codec == "libvpx-vp9":
        options |= {"deadline": "realtime", "cpu-used": "8"}
    with av.open(str(film)) as source, av.open(str(path), "w") as target:
        old: Any = source.streams.video[0]
        stream: Any = target.add_stream(codec, rate=old.average_rate, options=options)
        stream.width, stream.height, stream.pix_fmt = old.width, old.height, "yuv420p"
        for number, frame in enumerate(source.decode(old)):
            planes = frame.to_ndarray()
            luma = planes[: old.height]
            noise = grain * rng.standard_normal(luma.shape) * (luma > 20)
            luma[:] = np.clip(luma + noise, 16, 235).round()
            again = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            again.pts, again.time_base = number, 1 / old.average_rate
            target.mux(stream.encode(again))
        target.mux(stream.encode(None))


if __name__ == "__main__":
    write_trials(int(sys.argv[1]), 0, Path(sys.argv[2]))
