"""What training a stage takes, computed before anything is read: on fake tensors, which hold no memory.

So the plan of a network of billions of parameters is made on any machine, without data or text encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # what torch.compile plans with
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cascade.conditioning import Conditioning, TextEmbedding, Tokens
from cascade.nn.layers import ResBlock
from cascade.nn.unet import UNet
from prior.clip import CLIP
from prior.diffusion import PriorNet
from train.recipe import ClipRecipe, PriorRecipe, Recipe, StageRecipe

TEXT_LENGTH = 77  # tokens of a caption where the recipe leaves them to the text encoder
# torch 2.14 does not count the CPU's fused attention, in which other versions see its matrix products
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    )
}
Run = Callable[[int], object]  # on a batch of so many images
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """The cost of one stage. An image is a training sample: a crop where the stage trains on crops."""

    parameters: int
    flops: float  # of one image's forward pass, with what it costs the guess and the fine network to learn
    looks: float  # of the forward pass that nothing learns from: the base's, for its fine network
    activations: float  # bytes that one image's forward pass keeps for backward
    casts: float  # bytes of the weights in the working precision, beside the float32 ones

    @property
    def step_flops(self) -> float:
        """Of all that one image costs a training step. Backward is twice its forward pass."""
        return 3 * self.flops + self.looks


def make_plan(recipe: Recipe, stage: str) -> Plan:
    """The plan of a stage at the recipe's sizes and precision."""
    dtype = DTYPES[recipe.train_of(stage).precision]
    with FakeTensorMode():
        network, forward, learn = _network(recipe, stage)
        flops, kept, casts = _per_image(learn, network, dtype)
        fine = isinstance(network, UNet) and network.fine is not None
        looks = _per_image(forward, network, dtype)[0] if fine else 0.0
        parameters = sum(p.numel() for p in network.parameters())
    return Plan(parameters, flops, looks, kept, casts)


def _per_image(run: Run, network: nn.Module, dtype: torch.dtype | None) -> tuple[float, float, float]:
    """What one image more costs in FLOPs and bytes kept; and the bytes that do not grow with the batch, which
    are weights."""
    two, three = (_measure(run, network, batch, dtype) for batch in (2, 3))
    kept = three[1] - two[1]
    return three[0] - two[0], kept, two[1] - 2 * kept


def _measure(run: Run, network: nn.Module, batch: int, dtype: torch.dtype | None) -> tuple[float, float]:
    """FLOPs of forward passes, and the bytes they keep for backward beside the weights themselves."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages too: a freed one's address would come again

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(inputs[0])

    blocks = [m for m in network.modules() if isinstance(m, ResBlock)]
    checkpointed = blocks if getattr(network, "gradient_checkpointing", False) else []
    hooks = [block.register_forward_pre_hook(keep_input) for block in checkpointed]
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with (
        counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        run(batch)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def _network(recipe: Recipe, stage: str) -> tuple[nn.Module, Run, Run]:
    """The stage's network; its forward pass on a batch of so many images; and all that learns in a step on
    them, its guess and its fine network too."""
    part = recipe.of(stage)
    length = int(recipe.text.get("max_length") or TEXT_LENGTH)
    if isinstance(part, StageRecipe):
        return _unet(part, length)
    return _prior(part, length) if isinstance(part, PriorRecipe) else _clip(part, length)


def _unet(part: StageRecipe, length: int) -> tuple[nn.Module, Run, Run]:
    cfg, train = part.stage.unet, part.train
    side = train.crop_px or part.stage.image_px
    network = UNet(cfg)
    network.gradient_checkpointing = train.gradient_checkpointing

    def told(batch: int) -> Conditioning:
        text = None if not cfg.text_dims else _text(batch, length, cfg.text_dims, cfg.text_embed_dim)
        if text is not None and cfg.text_transformer is not None:
            text = _ids(batch, cfg.text_transformer.length)
        embed = None if cfg.image_embed_dim is None else torch.empty(batch, cfg.image_embed_dim)
        lowres = torch.empty(batch, cfg.lowres_channels, side, side) if cfg.lowres_channels else None
        level = None if lowres is None else torch.empty(batch)
        keep = torch.ones(batch, dtype=torch.bool)
        return Conditioning(
            text=text,
            image_embed=embed,
            lowres=lowres,
            aug_level=level,
            text_keep=keep[:, None].expand(-1, len(cfg.text_dims)) if text and cfg.learned_null else None,
            image_keep=None if embed is None else keep,
        )

    def forward(batch: int) -> Tensor:
        return network(torch.empty(batch, cfg.in_channels, side, side), torch.empty(batch), told(batch))

    def learn(batch: int) -> list[Tensor]:
        found = [forward(batch)]
        if network.guess is not None:
            count = batch * train.guess_share
            found.append(network.guess(told(count), count))
        if network.fine is not None:
            x, noise = torch.empty(batch, cfg.in_channels, side, side), torch.empty(batch, 1, 1, 1)
            found.append(network.fine.loss(x, noise, noise.flatten(), x, x, torch.empty(batch, 2)))
        return found

    return network, forward, learn


def _prior(part: PriorRecipe, length: int) -> tuple[nn.Module, Run, Run]:
    cfg, train = part.model, part.train
    network = PriorNet(cfg)

    def told(batch: int) -> TextEmbedding:
        dims = (cfg.text_dim,) * (cfg.text_sequence + 1)
        return _text(batch, min(length, cfg.text_length), dims, cfg.embed_dim)

    def forward(batch: int) -> Tensor:
        keep = torch.ones(batch, dtype=torch.bool) if cfg.learned_null else None
        prefix = network.prepare(told(batch), keep)
        return network(torch.empty(batch, cfg.embed_dim), torch.empty(batch), prefix)

    def learn(batch: int) -> list[Tensor]:
        found = [forward(batch)]
        if network.guess is not None:
            tokens = told(batch * train.guess_share).sequences[cfg.text_sequence]
            found.append(network.guess(tokens))
        return found

    return network, forward, learn


def _clip(part: ClipRecipe, length: int) -> tuple[nn.Module, Run, Run]:
    cfg = part.model
    network = CLIP(cfg)
    network.build_vision()

    def forward(batch: int) -> Tensor:
        text = _text(batch, length, (cfg.text_dim,) * (cfg.text_sequence + 1))
        images = torch.empty(batch, 3, cfg.image_px, cfg.image_px)
        return network.encode_image(images).sum() + network.encode_text(text).sum()

    return network, forward, forward


def _ids(batch: int, length: int) -> TextEmbedding:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return TextEmbedding((Tokens(torch.zeros(batch, length, 1, dtype=torch.long), mask),))


def _text(batch: int, length: int, dims: tuple[int, ...], pooled: int | None = None) -> TextEmbedding:
    mask = torch.ones(batch, length, dtype=torch.bool)
    sequences = tuple(Tokens(torch.empty(batch, length, dim), mask) for dim in dims)
    return TextEmbedding(sequences, None if pooled is None else torch.empty(batch, pooled))
