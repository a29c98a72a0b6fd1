"""The whole cascade: prompts -> text embedding -> CLIP image embedding -> 64 -> 256 -> 1024 px.

Everything that can be refused is refused before the first network runs. Pictures come prompt by prompt
(all pictures of the first prompt, then of the second); picture k of any prompt draws from seed + k.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from cascade import checkpoint
from cascade.adapter import load_adapter
from cascade.conditioning import TextEmbedding
from cascade.config import StageConfig, from_dict, to_dict
from cascade.errors import InputError, unknown
from cascade.hardware import network_dtype, place_network
from cascade.images import to_pil
from cascade.nn.unet import UNet
from cascade.request import PRIOR, Request, make_request
from cascade.stage import Stage
from cascade.text import TextEncoder, load_text_encoder

EMBEDDED = Path(__file__).parent / "models" / "emoji"


class Prior(Protocol):
    """Text to CLIP image embeddings (see the `prior` package). Further keyword arguments of `sample` are the
    settings that a call may give as prior=dict(...)."""

    def sample(
        self,
        text: TextEmbedding,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        negative: TextEmbedding | None = None,
        on_step: Callable[[int, int, Tensor], None] | None = None,
    ) -> Tensor:
        """B rows of text to B D; row i is a function of its text and of seeds[i], or of seed + i."""
        ...


class TextTower(Protocol):
    """The part of a CLIP that sampling uses."""

    def encode_text(self, text: TextEmbedding) -> Tensor:
        """Unit vectors, B D."""
        ...


@dataclass(frozen=True)
class Output:
    """Finished pictures, prompt by prompt."""

    images: list[Image]  # of the last stage that ran
    stages: dict[str, Tensor]  # B 3 H W in [-1, 1], float32, one entry a stage that ran
    image_embed: Tensor | None  # B D


@dataclass(frozen=True)
class Event:
    """One denoising step of one stage, or, with `output`, the end."""

    stage: str
    step: int  # from 1 to total, over all pictures
    total: int
    pictures: range  # which pictures the step worked on
    x0: Tensor | None = None  # their current estimate, b 3 H W in [-1, 1]; None in the prior
    output: Output | None = None  # in the last event only

    @property
    def preview(self) -> list[Image]:
        """The current estimate as pictures; empty in the prior."""
        return [] if self.x0 is None else to_pil(self.x0)


class _Stopped(Exception):
    """The reader of a stream went away."""


class Cascade:
    """Text to pictures through every stage. Load one with `from_pretrained`, or build one from parts."""

    def __init__(
        self,
        stages: Iterable[Stage],
        text_encoder: TextEncoder,
        prior: Prior | None = None,
        clip: TextTower | None = None,
        name: str = "cascade",
    ) -> None:
        """stages: in any order. name: what picture metadata calls the model.
        Raises InputError where stages share a name or were trained on another text encoder."""
        ordered = sorted(stages, key=lambda stage: stage.config.image_px)
        self.stages = {stage.config.name: stage for stage in ordered}
        self.text_encoder, self.prior, self.clip, self.name = text_encoder, prior, clip, name
        if len(self.stages) != len(ordered) or not ordered:
            raise InputError(f"stages: expected at least one, with different names, got {list(self.stages)}")
        for stage in ordered:
            dims = stage.config.unet.text_dims
            if dims and dims != tuple(text_encoder.dims):
                raise InputError(
                    f"stage {stage.config.name} was trained on token widths {list(dims)}, "
                    f"the text encoder gives {list(text_encoder.dims)}"
                )

    # -- folders -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> Cascade:
        """Load a model: the embedded default, a folder, or a hub id (owner/name, at `revision`).

        dtype: of the stages' networks; default bfloat16 where the device is fast at it, else float32.
        verify: check every file's sha256 (about a second a gigabyte). Raises InputError, one line, when
        anything is missing, damaged, unexpected or does not fit."""
        folder = checkpoint.resolve_source(EMBEDDED if source is None else source, revision)
        index = checkpoint.read_index(folder)
        if verify:
            checkpoint.verify(folder, index)
        if index.text_encoder is None:
            raise InputError(f"{folder / checkpoint.INDEX}: missing key 'text_encoder'")
        parts: dict[str, Any] = {
            name: _build(folder / name, library, class_name)
            for name, (library, class_name) in index.components.items()
        }
        stages = [part for part in parts.values() if isinstance(part, Stage)]
        for name, part in parts.items():
            if isinstance(part, Stage) and part.config.name != name:
                raise InputError(
                    f"{folder / name}: expected a stage of that name, found {part.config.name!r}"
                )
        encoder = load_text_encoder(index.text_encoder, folder, device)
        name = folder.name if source is None else str(source)
        pipe = cls(stages, encoder, parts.get("prior"), parts.get("clip"), name)
        return pipe.to(device, dtype or network_dtype(device))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a model folder, parameters in `dtype` (default: as they are; statistics keep theirs).

        A model folder in its place is replaced when the new one is complete; files in it that belong to no
        component (a model card, a text encoder) are kept. Any other non-empty folder is refused."""
        folder = Path(folder)
        extras = _extras(folder) if folder.exists() else []
        components: dict[str, tuple[str, str]] = {}
        with checkpoint.new_folder(folder) as new:
            parts = {"clip": self.clip, PRIOR: self.prior, **self.stages}
            for name, part in parts.items():
                if not isinstance(part, nn.Module):
                    continue
                class_name, module = type(part).__name__, part.unet if isinstance(part, Stage) else part
                checkpoint.save_component(
                    new / name, to_dict(part.config), _weights(module, dtype), class_name
                )
                components[name] = ("cascade" if isinstance(part, Stage) else "prior", class_name)
            for path in extras:
                if path.name not in components:
                    copy = shutil.copytree if path.is_dir() else shutil.copy2
                    copy(path, new / path.name)
            reference = _relative(self.text_encoder.reference(), folder)
            checkpoint.write_index(new, checkpoint.ModelIndex(components, reference))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cascade:
        """Move everything to `device`; `dtype` changes the number format of the stages' networks. The prior
        and the CLIP head stay in float32: they are small, and guidance amplifies their rounding."""
        for stage in self.stages.values():
            place_network(stage, device, dtype or stage.dtype)
        for module in (self.prior, self.clip):
            if isinstance(module, nn.Module):
                module.to(device).eval().requires_grad_(False)
        self.text_encoder.to(device)
        return self

    def load_adapter(self, folder: str | Path, scale: float = 1.0) -> Cascade:
        """Merge the low-rank adapter in `folder` into the component it was trained on, `scale` times; -scale
        takes it away again, up to rounding. Raises InputError, one line, where it does not fit."""
        adapter = load_adapter(folder)
        parts = {"clip": self.clip, PRIOR: self.prior, **self.stages}
        parts = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        name = adapter.config.component
        if name not in parts:
            raise unknown("component", name, parts, where=f"{folder}")
        part = parts[name]
        adapter.merge((part.unet if isinstance(part, Stage) else part).state_dict(), scale)
        return self

    @property
    def device(self) -> torch.device:
        return next(iter(self.stages.values())).device

    # -- sampling ------------------------------------------------------------------------------------------

    def encode(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Encode prompts, with the CLIP text embedding as `pooled` where the model has a CLIP. "" is allowed:
        it is the unconditional text. On the CPU prompts are encoded one by one, so that an embedding has the
        same bits whatever else is encoded beside it."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        groups = [[prompt] for prompt in prompts] if self.device.type == "cpu" else [prompts]
        return TextEmbedding.cat([self._encode(group) for group in groups])

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> TextEmbedding:
        text = self.text_encoder(prompts)
        return text if self.clip is None else replace(text, pooled=self.clip.encode_text(text))

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        negative: str | Sequence[str] | None = None,
        stop_at: str | None = None,
        start_at: str | None = None,
        images: Tensor | Sequence[Image] | None = None,
        image_embed: Tensor | None = None,
        size: tuple[int, int] | None = None,
        on_event: Callable[[Event], None] | None = None,
        **settings: dict[str, Any],
    ) -> Output:
        """Draw `num_images` pictures of each prompt.

        seed: one integer (picture k of any prompt draws from seed + k), or one a picture.
        negative: what pictures should not show: one text, or one a prompt.
        stop_at: the last stage to run ("prior" for the embedding alone); default the last.
        start_at: the first stage to run, on `images`: B 3 h w in [-1, 1] or PIL pictures, one, one a prompt
            or one a picture.
        image_embed: B D in place of the prior's, one row a picture.
        size: (H, W) in px of the pictures of the last stage that runs.
        on_event: called after every step (see `Event`).
        settings: base=dict(steps=25, guidance=4.0), prior=dict(...), ...: by stage, fields of SamplingConfig
            or keyword arguments of the prior's `sample`.
        Raises InputError, before anything runs, when something given cannot be."""
        request = self.request(
            prompts,
            seed=seed,
            num_images=num_images,
            negative=negative,
            stop_at=stop_at,
            start_at=start_at,
            images=images,
            image_embed=image_embed,
            size=size,
            **settings,
        )
        return self._run(request, on_event or (lambda event: None))

    def request(self, prompts: str | Sequence[str], **arguments: Any) -> Request:
        """What a call with these arguments would do, without doing it. InputError as the call would."""
        return make_request(self.stages, self.prior, prompts, **arguments)

    def stream(self, prompts: str | Sequence[str], **arguments: Any) -> Iterator[Event]:
        """The same as a call (arguments but `on_event`), as an iterator of events as it runs; the last event
        holds the `Output`.
        Closing the iterator stops the work at its next step."""
        inbox: queue.Queue[Event | BaseException] = queue.Queue(maxsize=1)  # previews are big: never pile up
        stopped = threading.Event()

        def send(item: Event | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return inbox.put(item, timeout=0.1)
                except queue.Full:
                    continue
            raise _Stopped

        def work() -> None:
            try:
                output = self(prompts, on_event=send, **arguments)
                last = next(reversed(output.stages), PRIOR)
                send(Event(last, 1, 1, range(len(output.images)), output=output))
            except _Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
                with contextlib.suppress(_Stopped):
                    send(error)

        worker = threading.Thread(target=work, name="cascade-stream", daemon=True)
        worker.start()
        try:
            while True:
                item = inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.output is not None:
                    return
        finally:
            stopped.set()
            worker.join()

    def _run(self, request: Request, report: Callable[[Event], None]) -> Output:
        text = self.encode(request.prompts).repeat(request.num_images)
        negative = None
        if request.negatives is not None:
            negative = self.encode(request.negatives).repeat(request.num_images)
        embed = request.image_embed
        if request.prior is not None:
            embed = self._sample_prior(request, text, negative, report)
        pictures, done = request.images, dict[str, Tensor]()
        for run in request.runs:
            name = run.stage.config.name

            def on_step(step: int, total: int, x0: Tensor, rows: range, name: str = name) -> None:
                report(Event(name, step, total, rows, x0))

            null = negative
            if null is None and not run.stage.config.unet.learned_null:
                null = self.encode("")
            pictures = done[name] = run.stage.sample(
                text,
                image_embed=embed,
                lowres=pictures,
                seed=request.seeds,
                negative=null,
                size=run.size,
                on_step=on_step,
                **run.settings,
            )
        last = next(reversed(done.values()), None)
        return Output([] if last is None else to_pil(last), done, embed)

    def _sample_prior(
        self,
        request: Request,
        text: TextEmbedding,
        negative: TextEmbedding | None,
        report: Callable[[Event], None],
    ) -> Tensor:
        """Image embeddings B D. One picture at a time on the CPU, for `Stage.sample`'s reason."""
        assert self.prior is not None and request.prior is not None
        count = len(request.seeds)
        size = 1 if self.device.type == "cpu" else count
        parts = []
        for start in range(0, count, size):
            part = slice(start, start + size)

            def on_step(step: int, total: int, _: Tensor, start: int = start) -> None:
                done = start // size * total + step + 1
                report(Event(PRIOR, done, -(-count // size) * total, range(start, start + size)))

            parts.append(
                self.prior.sample(
                    text[part],
                    seeds=request.seeds[part],
                    negative=None if negative is None else negative[part],
                    on_step=on_step,
                    **request.prior,
                )
            )
        return torch.cat(parts)


def _extras(folder: Path) -> list[Path]:
    """What a model folder holds beside its components and index. Raises InputError for any other folder."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    if not entries:
        return []
    if folder / checkpoint.INDEX not in entries:
        raise InputError(f"{folder} is no model folder and not empty: expected a new or empty folder")
    own = {checkpoint.INDEX, *checkpoint.read_index(folder).components}
    return [path for path in entries if path.name not in own]


def _relative(reference: Any, folder: Path) -> Any:
    """A text encoder's reference in which a path into the model folder is relative to it."""
    if isinstance(reference, dict):
        return {key: _relative(value, folder) for key, value in reference.items()}
    if isinstance(reference, list):
        return [_relative(value, folder) for value in reference]
    if isinstance(reference, str) and Path(reference).is_relative_to(folder.resolve()):
        return Path(reference).relative_to(folder.resolve()).as_posix()
    return reference


def _weights(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict with floating-point parameters, but no buffers, in `dtype`."""
    floating = {name for name, p in module.named_parameters() if p.is_floating_point()}
    return {name: t.to(dtype) if name in floating else t for name, t in module.state_dict().items()}


def _build(folder: Path, library: str, class_name: str) -> nn.Module:
    """A component from its folder; `library` and `class_name` are in `checkpoint.CLASSES`."""
    component = checkpoint.load_component(folder, class_name)
    if library == "cascade":
        config = from_dict(StageConfig, component.config, where=str(folder / checkpoint.CONFIG))
        with torch.device("meta"):  # no time spent on initial values
            unet = UNet(config.unet)
        checkpoint.load_tensors(unet, component.tensors, folder)
        return Stage(config, unet)
    cls = getattr(importlib.import_module(library), class_name)
    module = cls(from_dict(cls.config_class, component.config, where=str(folder / checkpoint.CONFIG)))
    checkpoint.load_tensors(module, component.tensors, folder)
    return module
