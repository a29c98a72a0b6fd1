"""What the HTML pages share: templates, pictures inside the page, files that appear whole."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cascade.errors import InputError
from cascade.images import from_pil, to_pil

TEMPLATES = Path(__file__).parent / "templates"
QUALITY = 82  # of WebP: no artefacts to be seen beside the PNG at the size shown


def environment() -> Environment:
    """Templates of eval/templates. Everything that is put into a page is escaped, prompts above all, and a
    name that the page was not given is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def open_picture(path: Path) -> Image.Image:
    """An RGB picture, transparency over white, without anything else the file said. Raises InputError."""
    try:
        with Image.open(path) as image:
            if image.mode == "RGB" and not image.has_transparency_data:
                return Image.fromarray(np.asarray(image))  # the same as below, at a fifth of the time
            return to_pil(from_pil(image)[None])[0]
    except (OSError, SyntaxError) as error:  # Pillow's errors of a broken file
        raise InputError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a whole picture'}"
        ) from None


def data_uri(image: Image.Image, px: int, quality: int = QUALITY) -> str:
    """The picture as WebP inside a URI, its longer side at most `px`. It holds pixels and nothing else: no
    name, text chunk or profile of the file it came from."""
    image = image.copy()
    image.thumbnail((px, px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def affordable_px(count: int, budget: int, sizes: Sequence[int]) -> int:
    """The largest of `sizes` (falling) at which `count` square pictures have at most `budget` pixels, else
    the smallest."""
    return next((px for px in sizes if count * px * px <= budget), sizes[-1])


def write_text(path: Path, text: str) -> Path:
    """UTF-8, whole or not at all. Raises InputError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path
