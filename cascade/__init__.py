"""Cascaded text-to-image diffusion in pixel space: text -> CLIP image embedding -> 64 -> 256 -> 1024 px.

Names are imported at first use, so that `import cascade` and `cascade --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade.conditioning import Conditioning as Conditioning
    from cascade.conditioning import TextEmbedding as TextEmbedding
    from cascade.errors import InputError as InputError
    from cascade.pipeline import Cascade as Cascade
    from cascade.stage import Stage as Stage

__version__ = "0.1.0"

_EXPORTS = {
    "Cascade": "cascade.pipeline",
    "Conditioning": "cascade.conditioning",
    "InputError": "cascade.errors",
    "Stage": "cascade.stage",
    "TextEmbedding": "cascade.conditioning",
}

__all__ = ["Cascade", "Conditioning", "InputError", "Stage", "TextEmbedding", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'cascade' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
