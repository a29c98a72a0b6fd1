"""The whole cascade: prompts -> text embedding -> CLIP image embedding -> 64 -> 256 -> 1024 px.

Everything that can be refused is refused before the first network runs. Pictures come prompt by prompt
(all pictures of the first prompt, then of the second); picture k of any prompt draws from seed + k.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from cascade import checkpoint
from cascade.adapter import load_adapter
from cascade.conditioning import TextEmbedding
from cascade.errors import InputError, unknown
from cascade.fit import check_fit
from cascade.hardware import network_dtype, place_network, resident
from cascade.images import to_pil
from cascade.inpaint import Pictures
from cascade.loading import build, find_model, read_text_encoder, save_model
from cascade.pretrained.model import OWN
from cascade.request import PRIOR, Request, make_request
from cascade.stage import Stage
from cascade.text import TextEncoder

_log = logging.getLogger("cascade")

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
        self.offload = False
        self._device = torch.device("cpu")
        self.peak: dict[str, int] = {}  # bytes on the device while each part worked, of the last call
        if not ordered and prior is None:
            raise InputError("stages: expected at least one, or a prior")
        embed_dim = getattr(getattr(prior, "config", None), "embed_dim", None)
        told = any(stage.config.unet.text_dims for stage in ordered)  # else an encoder need not be at hand
        check_fit([stage.config for stage in ordered], tuple(text_encoder.dims) if told else (), embed_dim)

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
        offload: bool = False,
        allow_legacy: bool = False,
    ) -> Cascade:
        """Load a model: the embedded default, a folder, or a hub id (owner/name, at `revision`). Folders of
        DeepFloyd IF, Karlo, Kandinsky's prior, GLIDE and the LAION prior are read as they are published.

        dtype: of the stages' networks; default bfloat16 where the device is fast at it, else float32.
        verify: check every file's sha256 (about a second a gigabyte).
        offload: keep each part in main memory and on `device` only while it works, and drop the text encoder
            once it has encoded. `peak` then says what each part needed.
        allow_legacy: read checkpoints that are pickles, of which tensors alone are taken.
        Raises InputError, one line, when anything is missing, damaged, unexpected or does not fit."""
        model = find_model(
            EMBEDDED if source is None else source, revision, verify=verify, allow_legacy=allow_legacy
        )
        if model.family != OWN and model.licence is not None:
            _log.warning("licence of %s: %s", model.folder, model.licence.name)
        parts: dict[str, Any] = {name: build(part) for name, part in model.parts.items()}
        stages = [part for part in parts.values() if isinstance(part, Stage)]
        encoder = read_text_encoder(model.text, "cpu" if offload else device)
        name = model.folder.name if source is None else str(source)
        pipe = cls(stages, encoder, parts.get(PRIOR), parts.get("clip"), name)
        pipe.offload = offload
        return pipe.to(device, dtype or network_dtype(device))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a model folder, parameters in `dtype` (default: as they are; statistics keep theirs).

        A model folder in its place is replaced when the new one is complete; files in it that belong to no
        component (a model card, a text encoder) are kept. Any other non-empty folder is refused."""
        save_model(Path(folder), self._modules(), self.text_encoder.reference(), dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cascade:
        """Move everything to `device`; `dtype` changes the number format of the stages' networks. The prior
        and the CLIP head stay in float32: they are small, and guidance amplifies their rounding."""
        self._device = torch.device(device)
        place = "cpu" if self.offload else device
        for stage in self.stages.values():
            place_network(stage, place, dtype or stage.dtype)
        for module in (self.prior, self.clip):
            if isinstance(module, nn.Module):
                module.to(place).eval().requires_grad_(False)
        self.text_encoder.to(device)
        return self

    def load_adapter(self, folder: str | Path, scale: float = 1.0) -> Cascade:
        """Merge the low-rank adapter in `folder` into the component it was trained on, `scale` times; -scale
        takes it away again, up to rounding. Raises InputError, one line, where it does not fit."""
        adapter = load_adapter(folder)
        parts = self._modules()
        name = adapter.config.component
        if name not in parts:
            raise unknown("component", name, parts, where=f"{folder}")
        part = parts[name]
        adapter.merge((part.unet if isinstance(part, Stage) else part).state_dict(), scale)
        return self

    @property
    def device(self) -> torch.device:
        """Where the parts work."""
        if self.offload or not self.stages:
            return self._device
        return next(iter(self.stages.values())).device

    def _modules(self) -> dict[str, nn.Module]:
        parts = {"clip": self.clip, PRIOR: self.prior, **self.stages}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def _at_work(self, name: str, part: object) -> AbstractContextManager[None]:
        """A part on the device while it works, where parts are kept off it."""
        if not self.offload:
            return contextlib.nullcontext()
        return resident(part if isinstance(part, nn.Module) else None, self._device, self.peak, name)

    # -- sampling ------------------------------------------------------------------------------------------

    def encode(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Encode prompts, with the CLIP text embedding as `pooled` where the model has a CLIP. "" is allowed:
        it is the unconditional text. On the CPU prompts are encoded one by one, so that an embedding has the
        same bits whatever else is encoded beside it."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        groups = [[prompt] for prompt in prompts] if self.device.type == "cpu" else [prompts]
        with self._at_work(checkpoint.TEXT_ENCODER, None):
            text = TextEmbedding.cat([self.text_encoder(group) for group in groups])
            if self.offload:
                self.text_encoder.release()
        if self.clip is None:
            return text
        with self._at_work("clip", self.clip), torch.no_grad():
            rows = [text[[i]] for i in range(len(text))] if self.device.type == "cpu" else [text]
            return replace(text, pooled=torch.cat([self.clip.encode_text(row) for row in rows]))

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
        inpaint: tuple[Pictures, Pictures] | None = None,
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
        inpaint: (picture, mask), for a model whose networks inpaint: PIL pictures, or B 3 h w in [-1, 1] and
            B 1 h w, of the proportions of what is drawn and at least its size; one, one a prompt or one a
            picture. The mask is white (1) where the picture is kept; the rest is drawn anew.
        size: (H, W) in px of the pictures of the last stage that runs.
        on_event: called after every step (see `Event`).
        settings: base=dict(steps=25, guidance=4.0), prior=dict(...), ...: by stage, fields of SamplingConfig
            and `micro_batch`, the pictures in one forward (see Stage.sample), or keyword arguments of the
            prior's `sample`.
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
            inpaint=inpaint,
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
        self.peak.clear()
        text, negative, null = self._encode_all(request)
        embed = request.image_embed
        if request.prior is not None:
            with self._at_work(PRIOR, self.prior):
                instead = negative if getattr(self.prior, "learned_null", True) else null
                embed = self._sample_prior(request, text, instead, report)
        pictures, done = request.images, dict[str, Tensor]()
        for run in request.runs:
            name = run.stage.config.name

            def on_step(step: int, total: int, x0: Tensor, rows: range, name: str = name) -> None:
                report(Event(name, step, total, rows, x0))

            with self._at_work(name, run.stage):
                pictures = done[name] = run.stage.sample(
                    text,
                    image_embed=embed,
                    lowres=pictures,
                    inpaint=None if run.known is None else (run.known.picture, run.known.mask),
                    seed=request.seeds,
                    negative=negative if run.stage.config.unet.learned_null else null,
                    size=run.size,
                    on_step=on_step,
                    **run.settings,
                )
        last = next(reversed(done.values()), None)
        return Output([] if last is None else to_pil(last), done, embed)

    def _encode_all(
        self, request: Request
    ) -> tuple[TextEmbedding, TextEmbedding | None, TextEmbedding | None]:
        """Text and negative text, one row a picture, and what networks without a learned null take for none:
        the negative text, or the encoded empty prompt. All at one time, so that the encoder may go."""
        learned = [run.stage.config.unet.learned_null for run in request.runs]
        learned.append(request.prior is None or getattr(self.prior, "learned_null", True))
        count = len(request.prompts)
        instead = request.negatives or ([] if all(learned) else [""] * count)
        both = self.encode([*request.prompts, *dict.fromkeys(instead)])
        text = both[:count].repeat(request.num_images)
        if not instead:
            return text, None, None
        order = {prompt: count + i for i, prompt in enumerate(dict.fromkeys(instead))}
        null = both[[order[prompt] for prompt in instead]].repeat(request.num_images)
        return text, null if request.negatives else None, null

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
