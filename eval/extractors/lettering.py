"""What a picture says, read by an optical reader, against what it was to say."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from cascade.errors import InputError
from cascade.images import to_uint8
from eval.extractors.base import Extractor
from eval.metrics.lettering import shown, similarity

MODELS = "PP-OCRv6, small"  # that the package ships


class Lettering(Extractor):
    """Rows of two numbers: similarity of the best reading to the wanted words, and 1 where they stand there
    whole (see `eval.metrics.lettering`). On the CPU, whatever the others run on."""

    reads_text = True

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise InputError("ocr needs the package rapidocr: pip install '.[eval]'") from None
        self.network = f"{MODELS} (rapidocr {version('rapidocr')})"
        self.resize = "none: the reader takes the picture in its own size"
        self.module = nn.Module()
        threads = "EngineConfig.onnxruntime.intra_op_num_threads"  # one, so that sums have one order
        self._reader: Any = RapidOCR(params={"Global.log_level": "critical", threads: 1})

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def prepare(self, picture: Tensor) -> Tensor:
        return to_uint8(picture).permute(1, 2, 0).flip(-1).contiguous()  # H W 3, blue first

    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        rows = []
        for picture, wanted in zip(pictures, texts, strict=True):
            seen = [str(line) for line in self._reader(picture.numpy()).txts or ()]
            rows.append([similarity(wanted, seen), float(shown(wanted, seen))])
        return torch.tensor(rows)
