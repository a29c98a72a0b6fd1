"""A CLIP of its own: a ViT from open_clip beside a small head on the frozen text encoder's tokens.

Both ends map to unit vectors of one space (Radford et al. 2021, arXiv:2103.00020). The text head has few
parameters because the text encoder is frozen and already holds the language. open_clip is imported at the
first picture, not before: sampling encodes text only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError
from cascade.nn.attention import extend_mask
from prior.transformer import Transformer

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP section 2.5: keeps training stable


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of both ends. Defaults: 64 px pictures in 8 x 8 patches of 8 px, and MiniLM tokens."""

    embed_dim: int = 256
    image_px: int = 64
    patch: int = 8
    width: int = 256
    layers: int = 6
    heads: int = 4
    text_dim: int = 384  # width of the frozen encoder's tokens
    text_sequence: int = 0  # which encoder's tokens, where several stand side by side
    text_width: int = 256
    text_layers: int = 2
    text_heads: int = 4

    def __post_init__(self) -> None:
        if self.image_px % self.patch:
            raise ValueError(f"image_px {self.image_px} is not a multiple of patch {self.patch}")
        for width, heads in ((self.width, self.heads), (self.text_width, self.text_heads)):
            if width % heads:
                raise ValueError(f"width {width} is not a multiple of heads {heads}")


class TextHead(nn.Module):
    """[class token; projected tokens] through a bidirectional transformer; the class token is the output.

    The tokens carry their positions already. The class token is never masked, so no softmax is empty."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.sequence = config.text_sequence
        self.norm = nn.LayerNorm(config.text_dim)
        self.input = nn.Linear(config.text_dim, config.text_width)
        self.class_token = nn.Parameter(torch.randn(config.text_width).mul_(0.02))
        self.transformer = Transformer(config.text_width, config.text_layers, config.text_heads)
        self.output = nn.Linear(config.text_width, config.embed_dim, bias=False)

    def forward(self, text: TextEmbedding) -> Tensor:
        """Returns B D, not normalised. Raises InputError for tokens of another width."""
        tokens = select_tokens(text, self.sequence, self.input.in_features, "clip")
        x = self.input(self.norm(tokens.states.to(self.input.weight.dtype)))  # B L D
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)  # B 1+L D
        mask = extend_mask(tokens.mask, before=1)[:, None, None, :]  # B 1 1 1+L
        states, _ = self.transformer(x, mask)
        return self.output(states[:, 0])


def select_tokens(text: TextEmbedding, sequence: int, width: int, who: str) -> Tokens:
    """Token sequence `sequence` of `text`. Raises InputError where it is absent or of another width."""
    count = len(text.sequences)
    if sequence >= count:
        raise InputError(f"{who}: expected at least {sequence + 1} token sequences, got {count}")
    tokens = text.sequences[sequence]
    if tokens.states.shape[-1] != width:
        raise InputError(f"{who}: expected text tokens of width {width}, got {tokens.states.shape[-1]}")
    return tokens


class CLIP(nn.Module):
    """Text and picture encoders into one space, and their contrastive loss.

    The vision tower's parameters exist from the start, under open_clip's own names, so that a state dict is
    always whole; open_clip's module is put around them by the first `encode_image` or by `build_vision`."""

    config_class: ClassVar[type] = ClipConfig

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.text = TextHead(config)
        self.vision = _vision_parameters(config)
        self._vision_built = False
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def image_px(self) -> int:
        """Side of the pictures that the vision tower sees."""
        return self.config.image_px

    def build_vision(self) -> None:
        """Import open_clip and put its VisionTransformer around the parameters, which stay the same objects:
        an optimizer that holds them goes on working. It happens by itself at the first picture; call it
        before torch.compile."""
        if not self._vision_built:
            self._build_vision()

    def _build_vision(self) -> None:
        from open_clip.transformer import VisionTransformer

        config = self.config
        with torch.device("meta"):
            tower = VisionTransformer(
                image_size=config.image_px,
                patch_size=config.patch,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                mlp_ratio=4.0,
                output_dim=config.embed_dim,
                pool_type="avg",
            )
        tower.load_state_dict(self.vision.state_dict(keep_vars=True), strict=True, assign=True)
        self.vision = tower.train(self.training)
        self._vision_built = True

    def encode_text(self, text: TextEmbedding) -> Tensor:
        """Unit vectors, B D, float32."""
        return F.normalize(self.text(text).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """images: B 3 H W in [-1, 1], any size (resized with an antialiasing filter).
        Returns unit vectors, B D, float32."""
        self.build_vision()
        images = resize(images, self.config.image_px).to(self.logit_scale.dtype)
        return F.normalize(self.vision(images).float(), dim=-1)

    def loss(self, images: Tensor, text: TextEmbedding, group: Tensor | None = None) -> Tensor:
        """Contrastive loss of a batch, a scalar. group: B integers; pairs of equal group (the same caption or
        the same record) are positives of each other. None: all pairs differ."""
        scale = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        return contrastive_loss(self.encode_image(images), self.encode_text(text), scale, group)

    def forward(self, images: Tensor, text: TextEmbedding, group: Tensor | None = None) -> Tensor:
        """`loss`, so that wrappers for compilation and parallel training apply."""
        return self.loss(images, text, group)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, group: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE over unit vectors B D, a scalar. The target of a row is uniform over its positives
    (arXiv:2004.11362 eq. 2, L_out); without equal groups it is the identity, and the loss is CLIP's."""
    with torch.autocast(image.device.type, enabled=False):  # 8 bits of mantissa blur logits near the maximum
        logits = scale * image.float() @ text.float().T  # B B
    if group is None:
        group = torch.arange(len(image), device=image.device)
    target = (group[:, None] == group[None, :]).float()  # B B
    target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def resize(images: Tensor, px: int) -> Tensor:
    """B 3 H W to B 3 px px, float32, bicubic with antialiasing; a picture of that size is left as it is."""
    images = images.float()
    if images.shape[-2:] == (px, px):
        return images
    return F.interpolate(images, size=(px, px), mode="bicubic", antialias=True).clamp(-1.0, 1.0)


def _vision_parameters(config: ClipConfig) -> nn.Module:
    """The parameters of open_clip's VisionTransformer in plain nested modules, initialised as OpenAI's CLIP
    initialises its transformers."""
    width, layers = config.width, config.layers
    positions = (config.image_px // config.patch) ** 2 + 1
    attn, proj, fc = width**-0.5, width**-0.5 * (2 * layers) ** -0.5, (2 * width) ** -0.5
    normals: dict[str, tuple[tuple[int, ...], float]] = {
        "class_embedding": ((width,), attn),
        "positional_embedding": ((positions, width), attn),
        "proj": ((width, config.embed_dim), attn),
        "conv1.weight": ((width, 3, config.patch, config.patch), (3 * config.patch**2) ** -0.5),
    }
    norms = ["ln_pre", "ln_post"]
    biases: dict[str, int] = {}
    for block in (f"transformer.resblocks.{i}" for i in range(layers)):
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        for name, shape, std in (
            ("attn.in_proj_", (3 * width, width), attn),
            ("attn.out_proj.", (width, width), proj),
            ("mlp.c_fc.", (4 * width, width), fc),
            ("mlp.c_proj.", (width, 4 * width), proj),
        ):
            normals[f"{block}.{name}weight"] = (shape, std)
            biases[f"{block}.{name}bias"] = shape[0]
    root = nn.Module()
    for name, (shape, std) in normals.items():
        _register(root, name, torch.randn(shape).mul_(std))
    for name, size in biases.items():
        _register(root, name, torch.zeros(size))
    for name in norms:
        _register(root, f"{name}.weight", torch.ones(width))
        _register(root, f"{name}.bias", torch.zeros(width))
    return root


def _register(root: nn.Module, name: str, value: Tensor) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.register_parameter(last, nn.Parameter(value))
