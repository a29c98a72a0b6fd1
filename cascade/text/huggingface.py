"""Any T5, and any other Hugging Face text encoder, by hub name or from a folder; safetensors only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.text.base import FrozenEncoder, TokenIds
from cascade.text.clean import clean_caption
from cascade.text.files import digests, first_line, resolve, verify
from cascade.text.int8 import to_int8

T5_CLASSES = {  # each variant has its own attention biases; AutoModel would load the decoder too
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # `resolve` has fetched
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]


@dataclass(frozen=True, kw_only=True)
class HuggingFaceReference:
    """How a model folder names such an encoder."""

    kind: Literal["hf"] = "hf"
    name: str  # subfolder of the model folder, a folder, or a hub repository
    revision: str | None = None
    subfolder: str = ""  # of the weights and config.json, in diffusers pipelines "text_encoder"
    tokenizer_subfolder: str | None = None  # None: as `subfolder`
    max_length: int = 77
    clean: bool = False  # clean captions as DeepFloyd IF does
    projection: bool = (
        False  # of CLIP: give the projected embedding, as it is, as `pooled` (Karlo, Kandinsky)
    )
    pad_id: int | None = None  # of padding tokens; None: the tokeniser's own (Karlo's own programs: 0)
    int8: bool = False  # keep the weights of linear layers in 8 bits: half the memory of bfloat16
    sha256: dict[str, str] = field(default_factory=dict)  # checked before loading

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InputError(f"max_length of {self.name}: expected at least 1, got {self.max_length}")


class HuggingFaceEncoder(FrozenEncoder):
    """Frozen encoder; states are those of its last layer. T5 runs in bfloat16 unless told otherwise and
    never in float16, in which its feed-forward layers overflow; other encoders run in float32."""

    def __init__(
        self,
        config: HuggingFaceReference,
        folder: Path | None,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(device, dtype or torch.float32)
        self.config = config
        self._given_dtype = dtype
        self._parent = folder
        self._folder: Path | None = None
        self._network_config: Any = None
        self._loaded: tuple[Any, Any] | None = None
        self._verified = False

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def dims(self) -> tuple[int, ...]:
        return (int(self._read_config().get_text_config().hidden_size),)

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        if self.config.clean and not isinstance(prompts, str):
            prompts = [clean_caption(p) if isinstance(p, str) else p for p in prompts]
        states, mask, *projected = self.encode(prompts)
        return TextEmbedding((Tokens(states, mask),), projected[0] if projected else None)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if self._loaded is not None:
            self._loaded[1].to(device=self.device)
        return self

    def reference(self) -> dict[str, Any]:
        """As given, with the sha256 of every weight and tokeniser file; a subfolder of a model folder
        becomes an absolute path, which holds wherever the reference is saved."""
        folder = self._find()
        result = to_dict(self.config)
        if self._parent is not None and (Path(self._parent) / self.config.name).is_dir():
            result["name"] = str(folder)
        if not result["sha256"]:
            places = {self.config.subfolder, self._tokenizer_subfolder}
            files = [p for place in places for pattern in PATTERNS for p in (folder / place).glob(pattern)]
            result["sha256"] = digests(folder, {p.relative_to(folder).as_posix() for p in files})
        return result

    def tokenise(self, prompts: list[str]) -> TokenIds:
        tokenizer, _ = self._load()
        uncut = tokenizer(prompts, truncation=False, verbose=False)["input_ids"]
        batch = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if self.config.pad_id is not None:
            ids = ids.where(mask, self.config.pad_id)
        return TokenIds(ids, mask, [len(tokens) for tokens in uncut])

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        _, model = self._load()
        if self.config.projection:  # causal: what stands before the padding does not see it
            output = model(input_ids=ids)
            return output.last_hidden_state, output.text_embeds
        return (model(input_ids=ids, attention_mask=mask.long()).last_hidden_state,)

    @property
    def _tokenizer_subfolder(self) -> str:
        given = self.config.tokenizer_subfolder
        return self.config.subfolder if given is None else given

    def _find(self) -> Path:
        if self._folder is None:
            places = {self.config.subfolder, self._tokenizer_subfolder}
            patterns = [f"{place}/{p}" if place else p for place in places for p in PATTERNS]
            self._folder = resolve(self.config.name, self.config.revision, self._parent, patterns)
        return self._folder

    def _read_config(self) -> Any:
        """The network's config; settles the dtype, which depends on the kind of network."""
        if self._network_config is None:
            from transformers import AutoConfig

            with _one_line(self.config.name):
                config = AutoConfig.from_pretrained(self._find() / self.config.subfolder, **LOCAL)
            if config.model_type in T5_CLASSES:
                if self._given_dtype == torch.float16:
                    raise InputError(f"{self.config.name}: T5 overflows in float16: expected bfloat16")
                self.dtype = self._given_dtype or torch.bfloat16
            self._network_config = config
        return self._network_config

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer

            config, folder = self._read_config(), self._find()
            if not self._verified:  # once: not again after each release
                verify(folder, self.config.sha256)
                self._verified = True
            with _one_line(self.config.name):
                tokenizer = AutoTokenizer.from_pretrained(folder / self._tokenizer_subfolder, **LOCAL)
            tokenizer.padding_side = "right"
            if tokenizer.pad_token is None:  # decoder-only networks have none
                tokenizer.pad_token = tokenizer.eos_token
            self._check_length(config, tokenizer)
            place = folder / self.config.subfolder
            model = _load_network(place, config, self.dtype, self.config.name, self.config.projection)
            if self.config.int8:
                to_int8(model)
            self._loaded = tokenizer, model.to(device=self.device).eval().requires_grad_(False)
        return self._loaded

    def _check_length(self, config: Any, tokenizer: Any) -> None:
        if config.model_type in T5_CLASSES:
            return  # relative positions: any length
        text = config.get_text_config()
        limit = min(tokenizer.model_max_length, getattr(text, "max_position_embeddings", None) or 10**9)
        if self.max_length > limit:
            name, given = self.config.name, self.max_length
            raise InputError(f"max_length of {name}: expected at most {limit}, got {given}")


def _load_network(folder: Path, config: Any, dtype: torch.dtype, name: str, projection: bool) -> Any:
    """The encoder half of the network, every weight of it from the files."""
    import transformers

    loader: Any = getattr(transformers, T5_CLASSES.get(config.model_type, "AutoModel"))
    if projection:
        loader = transformers.CLIPTextModelWithProjection
    given: dict[str, Any] = {"dtype": dtype, "variant": _variant(folder), **LOCAL}
    with _one_line(name), _quiet():
        model, report = loader.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **given
        )
    # a pooler on top of the last layer is not used here, and many checkpoints lack it
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(f"{name}: {len(missing)} weights are missing, the first is {missing[0]}")
    if projection:
        return model
    if hasattr(model, "text_model"):  # CLIP, SigLIP and other networks of two towers
        return model.text_model
    return model.get_encoder() if config.is_encoder_decoder and config.model_type not in T5_CLASSES else model


def _variant(folder: Path) -> str | None:
    """The variant (fp16) in which alone the folder holds the weights, or None."""
    names = {p.name for p in folder.glob("model.*")}
    if names & {"model.safetensors", "model.safetensors.index.json"}:
        return None
    found = (
        re.fullmatch(r"model\.(\w+)\.safetensors|model\.safetensors\.index\.(\w+)\.json", n) for n in names
    )
    return next((match[1] or match[2] for match in found if match), None)


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Errors of transformers about missing or unreadable files, as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load text encoder {name!r}: {first_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and load report, which `_load_network` reads itself."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
