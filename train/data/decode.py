"""From a picture's file to pixels. A file that is no whole picture is a `BadPicture`, whatever is wrong."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cascade.errors import InputError
from cascade.images import downsample, from_pil, from_uint8, to_uint8

_FILTERS = threading.Lock()  # warnings.catch_warnings changes what all threads see


class BadPicture(InputError):
    """One picture of the set cannot be used."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read {name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return BadPicture, (self.name, self.reason)


def read_file(name: str, path: Path) -> bytes:
    """The bytes of one picture. Raises BadPicture."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadPicture(name, (error.strerror or "cannot be read").lower()) from None


def decode(name: str, data: bytes, max_pixels: int) -> Tensor:
    """The picture as 3 H W, uint8: turned as its EXIF says, transparency over white, the first frame of an
    animation. The size is read before anything is decoded. Raises BadPicture."""
    with _opened(name, data, max_pixels) as image:
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode != "RGB":
                return to_uint8(from_pil(image))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except Exception as error:  # Pillow raises nearly every class on hostile files
            raise BadPicture(name, _reason(error)) from None


def size_of(name: str, data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height as the header tells, before the picture is turned as EXIF says. Raises BadPicture."""
    with _opened(name, data, max_pixels) as image:
        return image.size


def _opened(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The picture with its header read, and small enough to decode."""
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `max_pixels`
            image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise BadPicture(name, _reason(error)) from None
    if image.width * image.height > max_pixels:
        raise BadPicture(name, f"too large ({image.width}x{image.height} px, at most {max_pixels:,} in all)")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    text = next(iter(str(error).splitlines()), "")
    return f"not a whole picture ({text or type(error).__name__})"


def square(picture: Tensor, px: int, place: float = 0.5) -> Tensor:
    """The largest square of 3 H W uint8, antialiased to 3 px px. `place` in [0, 1] is where it lies along
    the longer side; 0.5 is the middle. A smaller one is enlarged (bicubic)."""
    height, width = picture.shape[1:]
    side = min(height, width)
    top, left = round(place * (height - side)), round(place * (width - side))
    cut = picture[:, top : top + side, left : left + side]
    if side == px:
        return cut
    if side > px:
        return to_uint8(downsample(from_uint8(cut), px))
    return to_uint8(F.interpolate(from_uint8(cut)[None], (px, px), mode="bicubic")[0])
