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
    numbers: Sequence[int] | None = None,
) -> Image.Image:
    """A sheet of frames, or of the files they are in, each with its number (from 1 on, if not given) and caption below.

    There are `columns` in a row, `width` pixels wide and all as high as the first one's aspect says.
    """
    first = _frame(images[0])
    height, letters = round(width * first.height / first.width), max(12, 10 * width // 64)
    wrapped = [textwrap.wrap(text, letters, initial_indent=" " * 4)[:6] or [""] for text in captions or []]
    columns, rows = min(columns, len(images)), -(-len(images) // columns)
    cell = height + (6 + 14 * max(map(len, wrapped)) if wrapped else 0)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (cell + GAP) + GAP), PAPER)
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(11), ImageFont.load_default(10)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (cell + GAP)
        sheet.paste(_frame(image).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        for j, line in enumerate(wrapped[i] if wrapped else ()):
            if j == 0:
                draw.text((x, y + height + 5), str(numbers[i] if numbers else i + 1), FAINT, small)
            words, indent = line.strip().replace(" ", "  "), 0 if j else 22  # thin spaces; the number stands before
            draw.text((x + indent, y + height + 4 + 14 * j), words, INK, font)
    return sheet


def _frame(image: Image.Image | Path | str) -> Image.Image:
    # One picture at a time is opened, and closed as soon as it is read: a story has thousands of shots.
    return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
