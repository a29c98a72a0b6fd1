"""Sheets of pictures that show how far a stage is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from cascade import Stage
from cascade.conditioning import TextEmbedding
from cascade.images import downsample, from_uint8, to_pil
from cascade.text import TextEncoder
from train.components import load_clip, load_prior, load_stage, trained
from train.data import PictureSet
from train.recipe import Recipe

GAP = 2  # px of grey after each picture
ROWS, LARGE_ROWS, LARGE_PX = 4, 2, 512  # of an upsampling sheet; fewer of pictures larger than that


def prompt_sheet(stage: Stage, recipe: Recipe, out: Path, encoder: TextEncoder) -> Image.Image:
    """The recipe's prompts at fixed seeds, by a stage that starts from noise."""
    text, null, embed = conditions(recipe, out, encoder, recipe.grid_prompts)
    negative = null_of(stage, null)
    return tile(stage.sample(text, image_embed=embed, negative=negative, seed=0, micro_batch=8), 8)


def upsampling_sheet(
    stage: Stage, recipe: Recipe, out: Path, encoder: TextEncoder, pictures: PictureSet
) -> Image.Image:
    """Held-out pictures (if any: else training pictures), a row each: shrunk, what the stage makes of that,
    what the stages below draw of the caption, what the stage makes of that, the original. Without the middle
    two while those stages are not trained."""
    config, side = stage.config, stage.config.image_px
    pool = pictures.heldout if len(pictures.heldout) else pictures.train
    rows = LARGE_ROWS if side > LARGE_PX else ROWS
    chosen = [int(i) for i in pool[:: max(1, len(pool) // rows)][:rows]]
    captions = [pictures.captions(i)[0] for i in chosen]
    real = from_uint8(torch.stack([pictures.resized(i, side, enlarge=True) for i in chosen]))  # B 3 H W
    text, null = encoder(captions), null_of(stage, encoder([""]))
    columns: dict[str, Tensor] = {}

    def add(name: str, lowres: Tensor) -> None:
        columns[name] = interpolate(lowres.float().cpu(), (side, side), mode="nearest")
        drawn = stage.sample(text, lowres=lowres, negative=null, seed=0, micro_batch=4)
        columns[f"from {name}"] = drawn.cpu()

    add("shrunk", downsample(real, config.lowres_px or side))
    if (drawn := drawn_below(recipe, out, config.name, encoder, captions, stage.device)) is not None:
        add("drawn", drawn)
    columns["original"] = real
    sheet = tile(torch.stack(list(columns.values()), dim=1).flatten(0, 1), len(columns))
    return headed(sheet, list(columns))


def drawn_below(
    recipe: Recipe,
    out: Path,
    name: str,
    encoder: TextEncoder,
    captions: Sequence[str],
    device: torch.device,
) -> Tensor | None:
    """What the stages below `name` draw of the captions, B 3 h w; None where one is not trained."""
    order = list(recipe.pictures)
    below = order[: order.index(name)]
    if not all(trained(out, stage) for stage in below):
        return None
    text, null, embed = conditions(recipe, out, encoder, captions)
    x = None
    for stage in below:
        network = load_stage(recipe, out, stage).to(device, torch.bfloat16)
        negative = null_of(network, null)
        x = network.sample(text, image_embed=embed, lowres=x, negative=negative, seed=0, micro_batch=4)
    return x


def conditions(
    recipe: Recipe, out: Path, encoder: TextEncoder, prompts: Sequence[str]
) -> tuple[TextEmbedding, TextEmbedding, Tensor | None]:
    """Encoded prompts, the encoded empty prompt (one row) and, for a cascade with a CLIP, image embeddings:
    the prior's where it is trained, else the CLIP's of the text."""
    both, count = encoder([*prompts, ""]), len(prompts)
    if recipe.base is None or recipe.base.stage.unet.image_embed_dim is None:
        return both[:count], both[count:], None
    pooled = load_clip(recipe, out).to(both.sequences[0].states.device).encode_text(both)
    both, prior = TextEmbedding(both.sequences, pooled), load_prior(recipe, out)
    text, null = both[:count], both[count:]
    if prior is None:
        return text, null, pooled[:count]
    negative = None if prior.learned_null else null
    return text, null, prior.to(pooled.device).sample(text, negative=negative, seed=0)


def null_of(stage: Stage, null: TextEmbedding) -> TextEmbedding | None:
    """What guidance of a stage without a null of its own starts from: the encoded empty prompt."""
    return None if stage.config.unet.learned_null else null


def tile(x: Tensor, columns: int) -> Image.Image:
    """B 3 H W to one picture, row by row, GAP px of grey between."""
    b, _, height, width = x.shape
    rows = -(-b // columns)
    sheet = Image.new("RGB", (columns * (width + GAP), rows * (height + GAP)), "grey")
    for i, picture in enumerate(to_pil(x)):
        sheet.paste(picture, ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    return sheet


def headed(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """The sheet under the names of its columns."""
    width = sheet.width // len(names)
    font = ImageFont.load_default(max(12, width // 24))
    height = 2 * int(font.size)  # pyright: ignore[reportAttributeAccessIssue]
    result = Image.new("RGB", (sheet.width, sheet.height + height), "white")
    result.paste(sheet, (0, height))
    pen = ImageDraw.Draw(result)
    for i, name in enumerate(names):
        pen.text((i * width + width // 2, height // 2), name, "black", font, anchor="mm")
    return result
