"""The judge's own networks, small heads on frozen features, trained on real training pictures alone.

`Matcher` is a CLIP (arXiv:2103.00020) of its own kind: EfficientNet-Lite0 on the side of pictures, MiniLM's
pooled states on that of captions, each with a small head. It has neither the picture network nor the seed of
the CLIP that a model is conditioned on. `Classifier` names an attribute of a picture.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cascade import random
from cascade.checkpoint import load_tensors
from cascade.errors import InputError
from cascade.pretrained.source import write_tensors
from cascade.progress import tracked
from cascade.text import TextEncoder
from eval.captioned import Record
from prior.clip import MAX_LOGIT_SCALE, contrastive_loss

IGNORED = -100  # label of a picture that does not have the attribute
CAPTIONS = 256  # encoded at a time
SPACE = 256  # numbers of a unit vector of `Matcher`


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained; part of the name that it is kept under."""

    seed: int = 6
    width: int = 512
    epochs: int = 30
    batch: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    noise: float = 0.1  # standard deviation of what is added to standardised features


class Head(nn.Module):
    """Rows N D, standardised and, in training, a little blurred, through two layers to N `out`."""

    mean: Tensor  # D
    spread: Tensor  # D

    def __init__(self, size: int, out: int, config: Training) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.noise = config.noise
        self.layers = nn.Sequential(
            nn.Linear(size, config.width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, out),
        )

    def standardise(self, rows: Tensor) -> None:
        """By these rows, from now on."""
        self.mean.copy_(rows.mean(dim=0))
        self.spread.copy_(rows.std(dim=0) + 1e-3)

    def forward(self, rows: Tensor) -> Tensor:
        rows = ((rows - self.mean) / self.spread).clamp(-6, 6)
        if self.training:
            rows = rows + self.noise * torch.randn_like(rows)
        return self.layers(rows)


class Trainable(nn.Module, ABC):
    """A network with its own loss."""

    @abstractmethod
    def standardise(self, pictures: Tensor, told: Tensor, /) -> None:
        """By rows of pictures and what is told of them."""

    @abstractmethod
    def loss(self, pictures: Tensor, told: Tensor, /) -> Tensor:
        """Of a batch of both."""


Network = TypeVar("Network", bound=Trainable)


class Matcher(Trainable):
    """Pictures' and captions' features to unit vectors of one space."""

    def __init__(self, picture_size: int, caption_size: int, config: Training) -> None:
        super().__init__()
        self.picture, self.caption = Head(picture_size, SPACE, config), Head(caption_size, SPACE, config)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def standardise(self, pictures: Tensor, captions: Tensor) -> None:
        self.picture.standardise(pictures)
        self.caption.standardise(captions)

    def encode(self, pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """N D and M E to N SPACE and M SPACE."""
        return F.normalize(self.picture(pictures), dim=1), F.normalize(self.caption(captions), dim=1)

    def loss(self, pictures: Tensor, captions: Tensor) -> Tensor:
        scale = self.scale.clamp(max=MAX_LOGIT_SCALE).exp()
        return contrastive_loss(*self.encode(pictures, captions), scale)


class Classifier(Trainable):
    """Scores of an attribute's classes."""

    def __init__(self, picture_size: int, classes: int, config: Training) -> None:
        super().__init__()
        self.head = Head(picture_size, classes, config)

    def standardise(self, pictures: Tensor, labels: Tensor) -> None:
        self.head.standardise(pictures)

    def forward(self, pictures: Tensor) -> Tensor:
        """N D to N C."""
        return self.head(pictures)

    def loss(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """labels: N integers."""
        return F.cross_entropy(self(pictures), labels)


# -- what they learn from -----------------------------------------------------------------------------------


def caption_rows(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Mean and maximum over the tokens of each caption's states: N 2D."""
    rows = []
    for start in tracked(range(0, len(captions), CAPTIONS), "captions"):
        tokens = encoder(captions[start : start + CAPTIONS]).sequences[0]
        most = tokens.states.masked_fill(~tokens.mask[:, :, None], -torch.inf).amax(dim=1)
        rows.append(torch.cat([tokens.mean(torch.float32), most], dim=1))
    return torch.cat(rows)


def classes_of(records: Sequence[Record], attributes: Sequence[str]) -> dict[str, list[str]]:
    """The values of each attribute that one picture can be told by; "light+dark" is of two people."""
    found = {
        name: sorted({r.attributes[name] for r in records if "+" not in r.attributes.get(name, "+")})
        for name in attributes
    }
    return {name: values for name, values in found.items() if len(values) > 1}


def labels_of(records: Sequence[Record], classes: Mapping[str, Sequence[str]]) -> Tensor:
    """The place of each record's value among the classes of each attribute: N A."""
    places = {name: {value: place for place, value in enumerate(values)} for name, values in classes.items()}
    rows = [[places[name].get(r.attributes.get(name, ""), IGNORED) for name in classes] for r in records]
    return torch.tensor(rows)


# -- training -----------------------------------------------------------------------------------------------


def trained(
    network: Callable[[], Network],
    data: Callable[[], tuple[Tensor, Tensor]],
    config: Training,
    file: Path,
    device: torch.device,
) -> Network:
    """The network that `network` begins, trained by its `loss` on rows of `data`, or as `file` keeps it. It
    is a function of the data and the settings: the same on every run of one kind of device."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.key(config.seed, "judge", file.stem))
        made = network().to(device)
        if not _read(made, file):
            _fit(made, [x.to(device) for x in data()], config, file.stem)
            _write(made, file)
    return made.eval().requires_grad_(False)


def file_name(what: str, config: Training, *sources: str) -> str:
    """Of the network trained by `config` on what `sources` name."""
    digest = hashlib.sha256("\x1f".join([str(asdict(config)), *sources]).encode()).hexdigest()
    return f"{what}-{digest[:16]}.safetensors"


def _read(network: Trainable, file: Path) -> bool:
    """Whether `file` held the network: if it is damaged, it is made anew."""
    try:
        load_tensors(network, load_file(file), file)
    except (OSError, SafetensorError, InputError):
        return False
    return True


def _write(network: Trainable, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(network.state_dict(), temporary)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {file}: {error}") from None


def _fit(network: Trainable, data: list[Tensor], config: Training, what: str) -> None:
    """AdamW; the learning rate rises over the first tenth and falls to 0 along a cosine."""
    count = len(data[0])
    batch = min(config.batch, count)
    steps = config.epochs * (count // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps + 1, pct_start=0.1)
    network.standardise(*data)
    network.train()
    for _ in tracked(range(config.epochs), f"training {what}"):
        order = torch.randperm(count).to(data[0].device)
        for part in order[: count - count % batch].split(batch):
            loss = network.loss(*(x[part] for x in data))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
