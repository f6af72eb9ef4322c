"""Pictures of films: strips of frames with captions, for storyboards, the README and notebooks."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 248, 244), (44, 40, 52), (140, 134, 148)
GAP = 8  # pixels between frames


def film_strip(
    images: Sequence[Image.Image | Path | str],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    width: int = 256,
) -> Image.Image:
    """Frames in rows, each with its number and caption below.

    Args:
        images: pictures, or paths of pictures.
        captions: one a picture; shown as plain text.
        columns: pictures in a row.
        width: pixels of a picture; the height of all follows from the first one's aspect.

    Raises:
        ValueError: there is no picture, or another number of captions.
    """
    if not images or (captions is not None and len(captions) != len(images)):
        raise ValueError(f"{len(images)} pictures and {len(captions or [])} captions: give a caption each, or none")
    first = _frame(images[0])
    height = round(width * first.height / first.width)
    lines = _wrapped(captions, width) if captions is not None else [[] for _ in images]
    font, number = ImageFont.load_default(11), ImageFont.load_default(10)
    cell = height + (6 + 14 * max(map(len, lines)) if captions is not None else 0)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (cell + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (cell + GAP)
        sheet.paste(_frame(image).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        for j, line in enumerate(text):
            draw.text((x + (22 if j == 0 else 0), y + height + 4 + 14 * j), line.strip(), INK, font)
        if text:
            draw.text((x, y + height + 5), str(i + 1), FAINT, number)
    return sheet


def _frame(image: Image.Image | Path | str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(image) as file:  # one open file at a time: a story has thousands of shots
        return file.convert("RGB")


def _wrapped(captions: Sequence[str], width: int) -> list[list[str]]:
    """Captions in lines that fit the width; the first line is shorter, a number stands before it."""
    letters = max(12, width // 6)
    return [textwrap.wrap(text, letters, initial_indent=" " * 4)[:6] or [""] for text in captions]
