"""Real pictures and pictures made elsewhere, as tensors of a stage's size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from torch import Tensor

from cascade.errors import InputError
from cascade.images import downsample, from_pil


def load_picture(path: Path) -> Tensor:
    """3 H W in [-1, 1]. Raises InputError where the file is no whole picture."""
    with _opened(path) as image:
        return from_pil(image)


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) by the file's header. Raises InputError where it has none."""
    with _opened(path) as image:
        return image.size


def load_square(path: Path, px: int) -> Tensor:
    """The centre square of a picture, antialiased to px x px: 3 px px in [-1, 1]. Raises InputError where it
    is smaller than that."""
    picture = load_picture(path)
    height, width = picture.shape[-2:]
    side = min(height, width)
    if side < px:
        raise InputError(f"{path}: expected at least {px} px, got {width}x{height}")
    top, left = (height - side) // 2, (width - side) // 2
    return downsample(picture[:, top : top + side, left : left + side], px)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's errors of a broken file
        reason = getattr(error, "strerror", None) or "not a whole picture"
        raise InputError(f"cannot read {path}: {reason}") from None
