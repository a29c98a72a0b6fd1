"""Tensors of a U-Net under two sets of names: this project's, and those of a public layout.

A layout is a list of `Binding`s. It is written once and serves both directions, and it also says which
tensors of which shapes the public file must hold: they are what this project's network, built on the meta
device, would be written as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cascade.checkpoint import check_tensors
from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.attention import Attention2d
from cascade.nn.check import check, head_width
from cascade.nn.condition import middle_attention
from cascade.nn.layers import ResBlock
from cascade.nn.unet import Level, UNet

Tensors = Mapping[str, Tensor]
Convert = Callable[[list[Tensor]], list[Tensor]]
Layout = Callable[[UNet], "list[Binding]"]


def check_public(cfg: UNetConfig) -> None:
    """`check`, and that heads divide their level's width: this project rounds their number, others do not."""
    sees = [own or text for own, text in zip(cfg.self_attention, cfg.text_attention, strict=True)]
    sees[-1] = sees[-1] or any(middle_attention(cfg))
    for i, c in enumerate(cfg.channels):
        width = head_width(cfg, i)
        if sees[i] and (width < 1 or c % width):
            raise InputError(f"attention heads of {width} do not divide level {i}'s width {c}")
    check(cfg)


@dataclass(frozen=True)
class Binding:
    """Tensors `ours` and `theirs` that hold the same numbers, and how to make each of the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Convert  # theirs to ours
    write: Convert  # ours to theirs


def same(ours: str, theirs: str) -> Binding:
    return Binding((ours,), (theirs,), list, list)


def layer(ours: str, theirs: str) -> list[Binding]:
    """Weight and bias."""
    return [same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def stacked(ours: str, *theirs: str) -> list[Binding]:
    """One layer of ours whose outputs are those of several layers of theirs."""

    def read(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts)]

    def write(whole: list[Tensor]) -> list[Tensor]:
        return list(whole[0].chunk(len(theirs)))

    return [
        Binding((f"{ours}.{part}",), tuple(f"{name}.{part}" for name in theirs), read, write)
        for part in ("weight", "bias")
    ]


def interleaved(
    ours: Sequence[tuple[str, str]], theirs: str, heads: int, parts: int, convolution: bool = True
) -> list[Binding]:
    """One layer of theirs whose output rows go head by head (head 0: q, k, v; head 1: q, k, v; ...), as the
    guided-diffusion family stores them; ours are the layers (weight, bias) that hold all q, then all k and v.
    With `convolution` their weight is that of a 1x1 Conv1d."""

    def read(whole: list[Tensor]) -> list[Tensor]:
        rows = whole[0].unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)
        width = len(rows) // parts
        return list(rows.split([width, len(rows) - width])) if len(ours) == 2 else [rows]

    def write(layers: list[Tensor]) -> list[Tensor]:
        return [torch.cat(layers).unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2)]

    weight = Binding(tuple(name for name, _ in ours), (f"{theirs}.weight",), read, write)
    bias = Binding(tuple(name for _, name in ours), (f"{theirs}.bias",), read, write)
    return [as_convolution(weight) if convolution else weight, bias]


def as_convolution(binding: Binding) -> Binding:
    """The same with their weight that of a 1x1 Conv1d: a last dimension of one."""

    def read(theirs: list[Tensor]) -> list[Tensor]:
        return binding.read([t[..., 0] for t in theirs])

    def write(ours: list[Tensor]) -> list[Tensor]:
        return [t[..., None] for t in binding.write(ours)]

    return Binding(binding.ours, binding.theirs, read, write)


def channels_first(ours: str, theirs: str, tokens: int) -> list[Binding]:
    """A layer that makes several tokens of a vector: their outputs go channel by channel, ours by token."""

    def read(whole: list[Tensor]) -> list[Tensor]:
        return [whole[0].unflatten(0, (-1, tokens)).transpose(0, 1).flatten(0, 1)]

    def write(whole: list[Tensor]) -> list[Tensor]:
        return [whole[0].unflatten(0, (tokens, -1)).transpose(0, 1).flatten(0, 1)]

    return [Binding((f"{ours}.{part}",), (f"{theirs}.{part}",), read, write) for part in ("weight", "bias")]


# -- the network's parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A residual block, an attention or a resampling block: its prefix in our names, and where it stands."""

    kind: Literal["block", "attention", "resample"]
    ours: str
    module: nn.Module
    side: Literal["down", "middle", "up"]
    level: int  # of its side, in order of use; 0 in the middle
    place: int  # in its level


def parts(net: UNet) -> Iterator[Part]:
    """All of an adm network's parts in order of use; an attention follows its block."""
    levels: list[tuple[Literal["down", "middle", "up"], int, str, nn.Module]] = [
        *(("down", i, f"down.{i}", level) for i, level in enumerate(net.down)),
        *([("middle", 0, "middle", net.middle)] if net.middle is not None else []),
        *(("up", i, f"up.{i}", level) for i, level in enumerate(net.up)),
    ]
    for side, i, prefix, level in levels:
        assert isinstance(level, Level)
        for j, (block, attention) in enumerate(zip(level.blocks, level.attentions, strict=True)):
            yield Part("block", f"{prefix}.blocks.{j}", block, side, i, j)
            if isinstance(attention, Attention2d):
                yield Part("attention", f"{prefix}.attentions.{j}", attention, side, i, j)
        if isinstance(level.resample, ResBlock):
            yield Part("resample", f"{prefix}.resample", level.resample, side, i, 0)


def skeleton(cfg: UNetConfig) -> UNet:
    """The network without memory for its tensors."""
    with torch.device("meta"):
        return UNet(cfg)


# -- both directions ---------------------------------------------------------------------------------------


def read(layout: Layout, theirs: Tensors, cfg: UNetConfig, what: str) -> dict[str, Tensor]:
    """Our tensors of theirs. Raises InputError that names the first tensor that does not fit."""
    net = skeleton(cfg)
    return translate(layout(net), theirs, net.state_dict(), what)


def write(layout: Layout, ours: Tensors, cfg: UNetConfig, what: str) -> dict[str, Tensor]:
    """Their tensors of ours. Raises InputError that names the first tensor that does not fit."""
    net = skeleton(cfg)
    check_tensors(ours, net.state_dict(), what)
    return written(layout(net), ours)


def translate(
    bindings: Sequence[Binding], theirs: Tensors, expected: Tensors, what: str
) -> dict[str, Tensor]:
    """Our tensors of theirs, which must be those that `expected` (ours, on any device) is written as."""
    check_tensors(theirs, written(bindings, expected), what)
    ours: dict[str, Tensor] = {}
    for binding in bindings:
        ours |= zip(binding.ours, binding.read([theirs[name] for name in binding.theirs]), strict=True)
    return ours


def written(bindings: Sequence[Binding], ours: Tensors) -> dict[str, Tensor]:
    """Their tensors of ours."""
    made: dict[str, Tensor] = {}
    for binding in bindings:
        made |= zip(binding.theirs, binding.write([ours[name] for name in binding.ours]), strict=True)
    return made
