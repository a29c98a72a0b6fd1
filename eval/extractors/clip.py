"""Joint spaces of pictures and texts: any CLIP of transformers or open_clip, the model's own, and the scores
that were trained on top of one (PickScore, HPSv2, the aesthetic predictor)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade import Cascade
from cascade.config import read_mapping
from cascade.errors import InputError
from cascade.pretrained.source import read_tensors
from eval.extractors.base import (
    Extractor,
    JointExtractor,
    as_safetensors,
    digest,
    find_file,
    find_folder,
    first_line,
    load_pretrained,
)
from eval.extractors.resize import PILLOW, pillow
from eval.extractors.vision import standardise

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = ("hf-hub:", "local-dir:")
BPE_WORDS = 49408  # of the one vocabulary that the CLIPs of transformers share
TEXTS = 64  # at a time


class ClipExtractor(JointExtractor):
    """Embeddings as the towers give them, of any length; comparisons bring them to length 1."""

    px: int
    mean: Sequence[float]
    std: Sequence[float]
    filter: str = "bicubic"

    def prepare(self, picture: Tensor) -> Tensor:
        return standardise(pillow(picture, self.px, self.filter), self.mean, self.std)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        return self.image_tower(torch.stack(list(pictures)).to(self.device)).float().cpu()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenise(list(texts)).to(self.device)
        return torch.cat([self.text_tower(part) for part in ids.split(TEXTS)]).float().cpu()

    @property
    def scale(self) -> float:
        """What the network multiplies cosines by."""
        return self.module.get_parameter("logit_scale").exp().item()

    @abstractmethod
    def image_tower(self, pixels: Tensor) -> Tensor:
        """B 3 px px to B D."""

    @abstractmethod
    def text_tower(self, ids: Tensor) -> Tensor:
        """B L to B D."""

    @abstractmethod
    def tokenise(self, texts: list[str]) -> Tensor:
        """B L integers."""


class TransformersClip(ClipExtractor):
    """A CLIPModel folder or repository; its text is cut into the words that open_clip ships."""

    def __init__(self, source: str) -> None:
        from transformers import CLIPModel

        folder = find_folder(source)
        self.module = load_pretrained(CLIPModel, folder)
        text, vision = self.module.config.text_config, self.module.config.vision_config
        if text.vocab_size != BPE_WORDS:
            raise InputError(f"{folder}: expected CLIP's {BPE_WORDS} words, found {text.vocab_size}")
        self.length, self.px = text.max_position_embeddings, vision.image_size
        self.mean, self.std = _statistics(folder / "preprocessor_config.json")
        self.network = f"CLIP ViT/{vision.patch_size} of {vision.num_hidden_layers} layers at {self.px} px"
        self.resize = PILLOW.format(self.filter, self.px)

    def image_tower(self, pixels: Tensor) -> Tensor:
        return self.module.visual_projection(self.module.vision_model(pixels).pooler_output)

    def text_tower(self, ids: Tensor) -> Tensor:
        return self.module.text_projection(self.module.text_model(ids).pooler_output)

    def tokenise(self, texts: list[str]) -> Tensor:
        from open_clip import tokenize

        return tokenize(texts, self.length)  # what follows the end token is masked by causality


class OpenClip(ClipExtractor):
    """hf-hub:owner/name, local-dir:/folder, or NAME,WEIGHTS with a name of `open_clip.list_models()` and a
    tag or a file of its weights."""

    def __init__(self, source: str, allow_legacy: bool = False) -> None:
        import open_clip

        schema = source.startswith(OPEN_CLIP)
        name, _, weights = (source, "", "") if schema else source.partition(",")
        if Path(weights).is_file():
            weights = str(as_safetensors(Path(weights), allow_legacy))
        try:
            self.module = open_clip.create_model(name, weights or None, require_pretrained=True)
            tokenizer: Any = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"cannot load CLIP {source}: {first_line(error)}") from None
        settings: Any = self.module.visual.preprocess_cfg
        size = settings["size"]
        self.px = size if isinstance(size, int) else size[0]
        self.mean, self.std, self.filter = settings["mean"], settings["std"], settings["interpolation"]
        self.network = f"open_clip {Path(name).name}"
        self.resize = PILLOW.format(self.filter, self.px)
        self._tokenizer = tokenizer

    def image_tower(self, pixels: Tensor) -> Tensor:
        return self.module.encode_image(pixels)

    def text_tower(self, ids: Tensor) -> Tensor:
        return self.module.encode_text(ids)

    def tokenise(self, texts: list[str]) -> Tensor:
        return self._tokenizer(texts)


def load_clip(source: str, allow_legacy: bool = False) -> ClipExtractor:
    """Of open_clip where the source is in its words, else of transformers."""
    of_open_clip = source.startswith(OPEN_CLIP) or "," in source
    return OpenClip(source, allow_legacy) if of_open_clip else TransformersClip(source)


def load_hpsv2(source: str, allow_legacy: bool = False) -> ClipExtractor:
    """FILE of HPSv2's weights (arXiv:2306.09341), or FILE,NAME with another shape than theirs."""
    file, _, name = source.partition(",")
    return OpenClip(f"{name or 'ViT-H-14'},{find_file(file)}", allow_legacy)


class OwnClip(JointExtractor):
    """The CLIP inside a model folder."""

    def __init__(self, source: str) -> None:
        self.pipe = Cascade.from_pretrained(source)
        if not isinstance(self.pipe.clip, nn.Module) or not hasattr(self.pipe.clip, "encode_image"):
            raise InputError(f"model {source} has no CLIP that encodes pictures: expected no own-clip")
        self.module = self.pipe.clip
        self.network = f"own CLIP of {Path(source).name}"
        self.resize = "bicubic with antialiasing, to its own size"

    def to(self, device: torch.device | str) -> None:
        self.pipe.to(device)

    def fingerprint(self) -> str:
        return digest(self.module.state_dict(), self.resize)

    def prepare(self, picture: Tensor) -> Tensor:
        return picture

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        clip: Any = self.module
        return clip.encode_image(torch.stack(list(pictures)).to(self.device)).float().cpu()

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        pooled = self.pipe.encode(list(texts)).pooled
        assert pooled is not None  # there is a CLIP
        return pooled.float().cpu()


class Aesthetic(Extractor):
    """The predictor of LAION (improved-aesthetic-predictor): a chain of linear layers on the unit embedding
    of CLIP ViT-L/14. Rows are of one number, the mark from 1 to 10."""

    def __init__(self, source: str, allow_legacy: bool = False) -> None:
        """source: FILE of the layers, or FILE,CLIP."""
        head, _, clip = source.partition(",")
        self.clip = load_clip(clip or "openai/clip-vit-large-patch14", allow_legacy)
        path = find_file(head)
        layers = _linear_chain(read_tensors(path, allow_legacy=allow_legacy), path)
        self.module = nn.ModuleDict({"clip": self.clip.module, "head": layers})
        self.network = f"aesthetic predictor on {self.clip.network}"
        self.resize = self.clip.resize

    def prepare(self, picture: Tensor) -> Tensor:
        return self.clip.prepare(picture)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        embedding = self.clip.encode(pictures, texts).to(self.device)
        return self.module["head"](nn.functional.normalize(embedding, dim=1)).float().cpu()


def _linear_chain(tensors: Mapping[str, Tensor], path: Path) -> nn.Sequential:
    """Linear layers in the order of the numbers in their names."""
    names = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    layers = []
    for name in names:
        weight, bias = tensors[f"{name}weight"], tensors.get(f"{name}bias")
        if weight.ndim != 2 or bias is None or (layers and layers[-1].out_features != weight.shape[1]):
            raise InputError(f"{path}: expected a chain of linear layers, found {name}weight otherwise")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise InputError(f"{path}: expected a chain of linear layers that ends in one number")
    return nn.Sequential(*layers)


def _statistics(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of pixels, of the folder or else of the published CLIPs."""
    settings = read_mapping(path) if path.is_file() else {}
    return settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
