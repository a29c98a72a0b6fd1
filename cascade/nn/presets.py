"""Stages of published size, as full configurations: `UNet(IMAGEN_BASE_2B.unet)`, `Stage(IF_I_XL)`.

Nothing here is trained. A test builds each on the meta device and holds its parameter count to the published
one. What a paper leaves open is marked "not published".
"""

from __future__ import annotations

import math
from dataclasses import replace

from cascade.config import (
    AugmentConfig,
    DiffusionConfig,
    SamplingConfig,
    ScheduleConfig,
    StageConfig,
    UNetConfig,
)

T5_XXL_DIM = 4096  # token width of the T5-XXL encoder, frozen in Imagen and in DeepFloyd IF

# Imagen (arXiv:2205.11487): every stage predicts the noise with an unweighted loss (appendix A), draws
# aug_level from U(0, 1) (2.4; 0.1 to 0.3 look best, D.2) and samples ancestrally, with guidance 5 and
# dynamic thresholding at the 99.5th percentile (2.3, figure A.10). Step counts are not published.
IMAGEN_COSINE = DiffusionConfig(prediction="eps", schedule=ScheduleConfig(name="cosine"), weighting="none")
IMAGEN_LINEAR = replace(IMAGEN_COSINE, schedule=ScheduleConfig(name="linear"))
IMAGEN_AUGMENT = AugmentConfig(max_level=1.0, schedule="cosine")
IMAGEN_SAMPLING = SamplingConfig(sampler="ddpm", steps=250, guidance=5.0, threshold="dynamic")
IMAGEN_SR_SAMPLING = replace(IMAGEN_SAMPLING, steps=100, aug_level=0.2)

# 64 px. Published: 2B (4.1, F.1). Here: 2.305B.
IMAGEN_BASE_2B = StageConfig(
    name="base",
    image_px=64,
    unet=UNetConfig(
        layout="adm",
        channels=(512, 1024, 1536, 2048),
        blocks=(3, 3, 3, 3),
        strides=(1, 2, 2, 2),
        self_attention=(False, True, True, True),  # at 32, 16 and 8 px
        text_attention=(False, True, True, True),
        head_channels=64,
        text_dims=(T5_XXL_DIM,),
        context_dim=2048,  # not published; NeMo's choice
    ),
    diffusion=IMAGEN_COSINE,
    sampling=IMAGEN_SAMPLING,
)

# 64 -> 256 px. Published: 600M (4.1, F.2). Here: 511M.
IMAGEN_SR_600M = StageConfig(
    name="sr256",
    image_px=256,
    lowres_px=64,
    unet=UNetConfig(
        layout="efficient",
        channels=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 8),
        strides=(2, 2, 2, 2),
        self_attention=(False, False, False, True),
        text_attention=(False, False, False, True),
        head_channels=128,  # 8 heads
        skip_scale=1 / math.sqrt(2),  # B.1
        text_dims=(T5_XXL_DIM,),
        lowres_channels=3,
    ),
    diffusion=IMAGEN_COSINE,
    augment=IMAGEN_AUGMENT,
    sampling=IMAGEN_SR_SAMPLING,
)

# 256 -> 1024 px. Published: 400M (4.1, F.3). F.2 without self-attention, as F.3 has it, comes to 507M; narrow
# text layers bring it near. Here: 450M.
IMAGEN_SR_400M = StageConfig(
    name="sr1024",
    image_px=1024,
    lowres_px=256,
    unet=replace(
        IMAGEN_SR_600M.unet,
        self_attention=(False, False, False, False),
        context_dim=1024,  # not published
        pool_projected=True,  # not published
    ),
    diffusion=IMAGEN_LINEAR,
    augment=IMAGEN_AUGMENT,
    sampling=IMAGEN_SR_SAMPLING,
)

# DeepFloyd IF-I-XL, 64 px. Published: 4.3B; its layout in diffusers has 4,304,695,110 parameters, as here.
IF_I_XL = StageConfig(
    name="base",
    image_px=64,
    unet=UNetConfig(
        out_channels=6,
        layout="adm",
        channels=(704, 1408, 2112, 2816),
        blocks=(3, 3, 3, 3),
        strides=(1, 2, 2, 2),
        self_attention=(False, True, True, True),
        text_attention=(False, True, True, True),
        head_channels=64,
        act="gelu",
        text_dims=(T5_XXL_DIM,),
        text_masked=False,
        context_dim=2816,
        context_norm="group",
        pool_heads=64,
        learned_null=False,  # the null text is the encoded ""
    ),
    diffusion=DiffusionConfig(
        prediction="eps",
        schedule=ScheduleConfig(name="discrete_cosine"),
        weighting="none",
        learned_variance=True,
    ),
    sampling=SamplingConfig(
        sampler="ddpm",
        steps=100,
        guidance=7.0,
        threshold="dynamic",
        threshold_percentile=0.95,
        threshold_cap=1.5,
    ),
)

PRESETS = {  # as recipes name them
    "imagen-base-2b": IMAGEN_BASE_2B,
    "imagen-sr-600m": IMAGEN_SR_600M,
    "imagen-sr-400m": IMAGEN_SR_400M,
    "if-i-xl": IF_I_XL,
}
