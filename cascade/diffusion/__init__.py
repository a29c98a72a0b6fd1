"""Diffusion maths: schedules, predictions, losses, guidance and samplers. Depends on torch alone."""

from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.guidance import GuidedDenoiser, apg, cfg, dynamic_threshold, rescale, static_threshold
from cascade.diffusion.loss import diffusion_loss, loss_weight
from cascade.diffusion.prediction import PREDICTIONS, Corrupted, corrupt, to_edm, to_eps, to_v, to_x0
from cascade.diffusion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, dpmpp_2m, dpmpp_2m_sde, heun
from cascade.diffusion.schedule import Schedule, alpha_sigma, make_schedule

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "Corrupted",
    "Denoiser",
    "GuidedDenoiser",
    "Schedule",
    "alpha_sigma",
    "apg",
    "cfg",
    "corrupt",
    "ddim",
    "ddim_invert",
    "ddpm",
    "diffusion_loss",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dynamic_threshold",
    "heun",
    "loss_weight",
    "make_schedule",
    "rescale",
    "static_threshold",
    "to_edm",
    "to_eps",
    "to_v",
    "to_x0",
]
