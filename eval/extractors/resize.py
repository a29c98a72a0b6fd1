"""The resizes that published measures prescribe. They are part of a measure: FID moves by whole points with
the filter (arXiv:2104.11222)."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from cascade.images import from_pil, to_pil, to_uint8
from prior.clip import resize

TENSORFLOW = "bilinear without antialiasing, corners aligned at the top left (TensorFlow 1), to {} px"
CLEAN = "bicubic with antialiasing, not rounded (clean-fid), to {} px"
PILLOW = "{} with antialiasing (Pillow), shorter side to {} px, centre crop"


def to_levels(picture: Tensor) -> Tensor:
    """[-1, 1] to the levels 0 to 255 that the file held, float32."""
    return to_uint8(picture).float()


def clean(picture: Tensor, px: int) -> Tensor:
    """3 H W in [-1, 1] to 3 px px in [-1, 1]: Pillow's bicubic filter on floats, as clean-fid applies it."""
    return resize(picture[None], px)[0]


def tensorflow(levels: Tensor, px: int) -> Tensor:
    """3 H W to 3 px px as the graph of the original FID does: pixel i samples the input at i * size / px."""
    height, width = levels.shape[-2:]
    return _sampling(height, px) @ levels @ _sampling(width, px).T


def pillow(picture: Tensor, px: int, filter_name: str = "bicubic") -> Tensor:
    """3 H W in [-1, 1] to the centre 3 px px of the picture whose shorter side has px, rounded to 8 bits, as
    CLIP's own preprocessing does."""
    (image,) = to_pil(picture[None])
    scale = px / min(image.size)
    width, height = (max(px, round(side * scale)) for side in image.size)
    left, top = (width - px) // 2, (height - px) // 2
    image = image.resize((width, height), Image.Resampling[filter_name.upper()])
    return from_pil(image.crop((left, top, left + px, top + px)))


def _sampling(size: int, px: int) -> Tensor:
    """px size: row i holds the weights of the two pixels around i * size / px."""
    place = torch.arange(px) * torch.tensor(size / px, dtype=torch.float32)
    left = place.long()
    right = (left + 1).clamp(max=size - 1)
    weight = place - left
    matrix = torch.zeros(px, size)
    rows = torch.arange(px)
    matrix.index_put_((rows, left), 1 - weight, accumulate=True)
    matrix.index_put_((rows, right), weight, accumulate=True)
    return matrix
