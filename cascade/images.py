"""The one place where 8-bit pictures (PIL, files) meet tensors in [-1, 1].

Tensors are float, RGB, B 3 H W or 3 H W; -1 is 0 and +1 is 255. Resampling of tensors that must not
alias is here too, so that training data and low-resolution conditioning pass through one filter.
"""

from __future__ import annotations

import contextlib
import io
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from cascade.errors import InputError


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float to uint8 of the same shape; values outside are clamped, not wrapped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1] of the same shape; `to_uint8` inverts it exactly."""
    return x.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_pil(x: Tensor) -> list[Image.Image]:
    """B 3 H W in [-1, 1] to RGB pictures."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"pictures: expected a tensor of shape B 3 H W, got {tuple(x.shape)}")
    pixels = to_uint8(x.detach()).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # B H W 3
    return [Image.fromarray(p) for p in pixels]


def from_pil(image: Image.Image) -> Tensor:
    """A picture of any mode to 3 H W in [-1, 1]; transparency is laid over white, as on a page."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))  # H W 3
    return from_uint8(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def open_picture(path: Path | str) -> Image.Image:
    """A picture file, as its camera meant it to stand. Raises InputError where it is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a whole picture"
        raise InputError(f"cannot read {path}: {reason}") from None


def jpeg(x: Tensor, quality: int) -> Tensor:
    """3 H W in [-1, 1] after JPEG compression at `quality` (1 to 95)."""
    buffer = io.BytesIO()
    to_pil(x[None])[0].save(buffer, "JPEG", quality=quality)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        return from_pil(image).to(device=x.device, dtype=x.dtype)


def save_png(image: Image.Image, path: Path | str, metadata: Mapping[str, object] | None = None) -> Path:
    """Write a PNG whose text chunks hold `metadata` (each value as `str`). The file appears whole or not
    at all: it is written beside its place and renamed. Raises InputError where it cannot be written."""
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        _add_text(chunks, name, str(value))
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            image.save(file, "PNG", pnginfo=chunks)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:  # interrupted
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_png_metadata(path: Path | str) -> dict[str, str]:
    """The text chunks of a PNG file. Raises InputError where it is missing or not a PNG."""
    try:
        with Image.open(path) as image:
            if not isinstance(image, PngImagePlugin.PngImageFile):
                raise InputError(f"{path}: expected a PNG file, got {image.format}")
            return {str(name): str(value) for name, value in image.text.items()}
    except (OSError, SyntaxError) as error:  # Pillow's errors of a broken file
        reason = getattr(error, "strerror", None) or "not a whole picture"
        raise InputError(f"cannot read {path}: {reason}") from None


def downsample(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """B 3 H W (or 3 H W) to `size` (one side of a square, or H and W) without aliasing: 2x2 box means
    while they fit, then antialiased bicubic for the rest, clamped to [-1, 1] (the filter of guided-
    diffusion's image_datasets.py). A power of two is thus a plain box mean, which commutes with crops
    on its grid: the low-resolution crop of a training picture is the crop of its low-resolution picture.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height > x.shape[-2] or width > x.shape[-1]:
        raise InputError(f"downsample: {height}x{width} is larger than {x.shape[-2]}x{x.shape[-1]}")
    out = x.float() if x.ndim == 4 else x.float()[None]
    while _halves(out.shape[-2], height) and _halves(out.shape[-1], width):
        out = F.avg_pool2d(out, 2)
    if out.shape[-2:] != (height, width):
        out = F.interpolate(out, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    out = out.to(x.dtype)
    return out if x.ndim == 4 else out[0]


def _halves(side: int, target: int) -> bool:
    return side % 2 == 0 and side >= 2 * target


def _add_text(chunks: PngImagePlugin.PngInfo, name: str, value: str) -> None:
    try:
        value.encode("latin-1")
        chunks.add_text(name, value)
    except UnicodeEncodeError:
        chunks.add_itxt(name, value)  # tEXt holds Latin-1 only
