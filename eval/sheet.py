"""One picture of many, each with a caption under it.

`python -m eval.sheet MODEL PROMPT... --out sheet.png` draws prompts through the whole cascade; @FILE reads
a prompt a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from PIL.ImageFont import ImageFont as BitmapFont

from cascade import Cascade, InputError
from cascade.arguments import Parser
from cascade.images import save_png

CELL, GAP, TEXT_PX, LINES = 136, 8, 11, 3
LINE_PX = TEXT_PX + 3


def captioned_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Rows of `columns` pictures on white, brought to CELL px, captions wrapped to at most LINES lines."""
    font = ImageFont.load_default(TEXT_PX)
    rows = -(-len(pictures) // columns)
    step_x, step_y = CELL + GAP, CELL + LINES * LINE_PX + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GAP + index % columns * step_x, GAP + index // columns * step_y
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        for number, line in enumerate(wrap(caption, font)):
            pen.text((x, y + CELL + 2 + number * LINE_PX), line, "black", font)
    return sheet


def wrap(caption: str, font: FreeTypeFont | BitmapFont) -> list[str]:
    """At most LINES lines of at most CELL px, broken at spaces; what does not fit ends in dots."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    kept = lines[:LINES]
    if len(lines) > LINES:
        kept[-1] += "..."
    return [_shorten(line, font) for line in kept]


def _shorten(line: str, font: FreeTypeFont | BitmapFont) -> str:
    while font.getlength(line) > CELL:
        line = f"{line.removesuffix('...')[:-1]}..."
    return line


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.sheet", description=__doc__, fromfile_prefix_chars="@")
    parser.add_argument("model", help="a model folder or a hub id")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    try:
        arguments = parser.parse_args(argv)
        pictures = Cascade.from_pretrained(arguments.model)(arguments.prompts, seed=arguments.seed).images
        save_png(captioned_sheet(pictures, arguments.prompts), arguments.out)
    except InputError as error:
        print(f"eval.sheet: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
