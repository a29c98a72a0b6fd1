"""Training data: which pictures, in which order, with which captions.

Everything a training step draws is a function of (seed, position), where the position counts samples over the
whole run; so a step sees the same samples and the same noise at any number of processes and after a resume.
`python -m train.data RECIPE` fetches and indexes a recipe's set, `python -m train.data check RECIPE` reports
on it.
"""

from __future__ import annotations

from train.data.config import DataConfig
from train.data.decode import BadPicture
from train.data.pictures import PictureSet, Reader, View

__all__ = ["BadPicture", "DataConfig", "PictureSet", "Reader", "View", "open_pictures"]


def open_pictures(cfg: DataConfig) -> PictureSet:
    """The set that a recipe names. Raises InputError, one line, where it is not there or not as described."""
    if cfg.name == "emoji":
        from train.data.emoji import EmojiPictures

        return EmojiPictures(cfg)
    if cfg.name == "webdataset":
        from train.data.shards import TarPictures

        return TarPictures(cfg)
    from train.data.table import FolderPictures, HuggingFacePictures

    return FolderPictures(cfg) if cfg.name == "folder" else HuggingFacePictures(cfg)
