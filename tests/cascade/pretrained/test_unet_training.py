"""A network of each public family learns a fixed batch, with the hybrid loss where it emits its variance."""

from __future__ import annotations

import pytest
import torch

from cascade.config import DiffusionConfig, ScheduleConfig
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.loss import diffusion_loss
from cascade.nn.unet import UNet
from cascade.pretrained.unet import unet_from_original
from tests.cascade.pretrained.original import OriginalUNet, Spec
from tests.cascade.pretrained.test_unet_original import inputs, params

SPECS = {
    "floyd I": Spec("floyd", act="gelu"),
    "floyd II": Spec("floyd", inputs=6, told=True, residual=0.7071, cross_only=True, act="gelu"),
    "karlo decoder": Spec("decoder"),
    "karlo sr": Spec("plain", inputs=6, outputs=3, attends=(False, False), scale_shift=False),
    "glide": Spec("glide"),
    "glide inpaint": Spec("glide", inputs=7),
}


@pytest.mark.parametrize("family", SPECS)
def test_fifty_steps_on_a_fixed_batch_lower_the_loss(family: str) -> None:
    torch.manual_seed(0)
    spec = SPECS[family]
    with torch.device("meta"):
        tensors = OriginalUNet(spec).state_dict()
    learned = spec.outputs == 6
    process = DiffusionConfig(
        prediction="eps",
        schedule=ScheduleConfig(name="discrete_cosine"),
        weighting="none",
        learned_variance=learned,
    )
    denoiser = Denoiser(UNet(unet_from_original(tensors, params(spec), head_channels=spec.head)), process)
    _, x0, cond = inputs(spec, seed=1)
    logsnr, eps = (
        denoiser.schedule.logsnr(torch.tensor([0.3, 0.7], dtype=torch.float64)),
        torch.randn_like(x0),
    )
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    losses = []
    for _ in range(50):
        loss = diffusion_loss(denoiser, x0.tanh(), cond, logsnr, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
