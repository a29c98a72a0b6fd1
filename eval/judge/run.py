"""The judge at work: what is drawn, looked at and trained for each part of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import Cascade
from cascade.images import save_png, to_pil
from cascade.text import TextEncoder, load_text_encoder
from eval.captioned import Record
from eval.judge import measures
from eval.judge.features import COLOURS, FINAL, HEADS, PIXELS, PooledLayers, Sized
from eval.judge.networks import (
    IGNORED,
    Classifier,
    Matcher,
    Training,
    caption_rows,
    classes_of,
    file_name,
    labels_of,
    trained,
)
from eval.judge.pictures import Workshop, data_sha256
from eval.pictures import load_square
from eval.sheet import captioned_sheet

# What tells each attribute: a network that sees all of a row learns tones worse than one of colours alone.
ATTRIBUTES = {"style": HEADS, "tone": COLOURS, "gender": HEADS}
CELL = "cell"  # attribute of a picture that is one of a grid of skin tone, gender and profession
MATCHING = Training()
# Noise as large as the features' own spread: with a twentieth of it the tone of real pictures of unseen cells
# is told a point less often.
CLASSIFYING = Training(width=256, epochs=50, batch=256, lr=2e-3, dropout=0.2, noise=1.0)
SHOWN = 64  # mistakes on a sheet


@dataclass(frozen=True)
class Seen:
    """Pictures: what they were to show, their files, and their features N D."""

    records: list[Record]
    files: list[Path]
    rows: Tensor

    def first(self, count: int) -> Seen:
        return Seen(self.records[:count], self.files[:count], self.rows[:count])

    def by_file(self) -> Seen:
        order = sorted(range(len(self.files)), key=self.files.__getitem__)
        return Seen([self.records[i] for i in order], [self.files[i] for i in order], self.rows[order])


class Judge:
    """Makes the report on one model. `folder` keeps features, pictures and networks."""

    def __init__(
        self,
        pipe: Cascade,
        identity: str,
        folder: Path,
        train: list[Record],
        heldout: list[Record],
        seed: int,
    ) -> None:
        """train, heldout: in the order in which their captions are drawn."""
        self.train, self.heldout, self.folder, self.device = train, heldout, folder, pipe.device
        self.data = data_sha256([*train, *heldout])
        self.workshop = Workshop(pipe, identity, self.data, folder, seed)
        self.captions = load_text_encoder({"kind": "minilm"}, device=pipe.device)
        self.base_px = next(iter(self.workshop.stages))

    def report(self, counts: Mapping[int, int], out: Path) -> dict[str, Any]:
        """counts: how many pictures at which sizes. Sheets of mistakes go beside `out`."""
        most = next(iter(counts.values()))
        look = PooledLayers(self.base_px)
        look.to(self.device)
        train = self._look_real(look, self.train, "train")
        sets = {
            "real, seen": train.first(most),
            "real, held out": self._look_real(look, self.heldout, "heldout"),
            "drawn, seen": self._look_drawn(look, self.train[:most], "seen"),
            "drawn, held out": self._look_drawn(look, self.heldout[:most], "heldout"),
        }
        source = f"{self.data} {look.fingerprint()}"
        return {
            "network": look.network,
            "frechet": {
                str(px): self._frechet(px, count, train.rows, sets["drawn, seen"].rows)
                for px, count in counts.items()
            },
            "neighbours": {
                name: measures.neighbours(
                    train.rows[:, columns],
                    {name: same.rows[:, columns] for name, same in sets.items() if name != "real, seen"},
                )
                for name, columns in (("features", FINAL), ("pixels", PIXELS))
            },
            "match": self._match(sets, train.by_file(), source, out),
            "attributes": self._attributes(sets, train.by_file(), source),
        }

    # -- sets -----------------------------------------------------------------------------------------------

    def _frechet(self, px: int, count: int, real: Tensor, drawn: Tensor) -> dict[str, float]:
        """real, drawn: features at the first stage's size."""
        if px == self.base_px:
            return measures.frechet(real[:, FINAL], drawn[:count, FINAL], None)
        look = Sized(px)
        look.to(self.device)
        records, shop = self.train[:count], self.workshop
        drawn = shop.rows(look, shop.draw(records, px, f"{px} px"), f"{shop.identity}-seen-{px}")
        files = shop.enlarge(records, px, f"{px} px of real ones")
        enlarged = shop.rows(look, files, f"{shop.identity}-enlarged-{px}")
        return measures.frechet(self._look_real(look, self.train, "train").rows, drawn, enlarged)

    def _look_real(self, look: Sized, records: list[Record], split: str) -> Seen:
        """Features are kept in an order that does not depend on the seed."""
        files = [record.path for record in records]
        order = sorted(range(len(files)), key=files.__getitem__)
        rows = self.workshop.rows(look, [files[i] for i in order], f"real-{split}-{look.px}")
        return Seen(records, files, rows[torch.tensor(order).argsort()])

    def _look_drawn(self, look: Sized, records: list[Record], what: str) -> Seen:
        files = self.workshop.draw(records, look.px, f"{look.px} px, {what}")
        name = f"{self.workshop.identity}-{what}-{look.px}"
        return Seen(records, files, self.workshop.rows(look, files, name))

    # -- pictures -------------------------------------------------------------------------------------------

    def _match(self, sets: Mapping[str, Seen], train: Seen, source: str, out: Path) -> dict[str, Any]:
        texts = _Texts(self.captions)
        judge = trained(
            lambda: Matcher(HEADS.stop, 2 * self.captions.dims[0], MATCHING),
            lambda: (train.rows[:, HEADS], texts.rows(train.records)),
            MATCHING,
            self.folder / "networks" / file_name("matcher", MATCHING, source),
            self.device,
        )
        report = {}
        for name, seen in sets.items():
            pictures, captions = seen.rows[:, HEADS].to(self.device), texts.rows(seen.records).to(self.device)
            ranks, best = measures.matches(*judge.encode(pictures, captions))
            right = (ranks == 0).cpu()
            report[name] = {kind: measures.hits(right[kept]) for kind, kept in kinds(seen.records).items()}
            wrong = (~right).nonzero().flatten().tolist()[:SHOWN]
            words = [f"{seen.records[i].text} -> {seen.records[int(best[i])].text}" for i in wrong]
            file = out.with_name(f"{out.stem}-wrong-{name.replace(', ', '-').replace(' ', '')}.png")
            _save_sheet([seen.files[i] for i in wrong], words, self.base_px, file)
        return report

    def _attributes(self, sets: Mapping[str, Seen], train: Seen, source: str) -> dict[str, Any]:
        classes = classes_of(train.records, list(ATTRIBUTES))
        labels = labels_of(train.records, classes)
        judges = [
            self._classifier(name, len(values), train.rows, label, source)
            for (name, values), label in zip(classes.items(), labels.T, strict=True)
        ]
        report = {}
        for name, seen in sets.items():
            scores = [
                judge(seen.rows[:, ATTRIBUTES[attribute]].to(self.device)).cpu()
                for attribute, judge in zip(classes, judges, strict=True)
            ]
            labels = labels_of(seen.records, classes)
            report[name] = {
                kind: measures.attributes([s[kept] for s in scores], labels[kept], classes)
                for kind, kept in kinds(seen.records).items()
            }
        return report

    def _classifier(self, name: str, classes: int, rows: Tensor, labels: Tensor, source: str) -> Classifier:
        """Trained on the rows that have a label."""
        columns, has = ATTRIBUTES[name], labels != IGNORED
        return trained(
            lambda: Classifier(columns.stop - columns.start, classes, CLASSIFYING),
            lambda: (rows[has, columns], labels[has]),
            CLASSIFYING,
            self.folder / "networks" / file_name(name, CLASSIFYING, source),
            self.device,
        )


def kinds(records: list[Record]) -> dict[str, Tensor]:
    """Which of the records are of each kind, N booleans each; kinds without any are left out."""
    cells = torch.tensor([CELL in record.attributes for record in records])
    found = {"all": torch.ones_like(cells), "tone x gender x base": cells, "style x object": ~cells}
    return {name: kept for name, kept in found.items() if kept.any()}


class _Texts:
    """Features of captions, each computed once."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder, self._known = encoder, dict[str, Tensor]()

    def rows(self, records: list[Record]) -> Tensor:
        missing = [record.text for record in records if record.text not in self._known]
        if missing:
            self._known |= zip(missing, caption_rows(self._encoder, missing).cpu(), strict=True)
        return torch.stack([self._known[record.text] for record in records])


def _save_sheet(files: list[Path], words: list[str], px: int, path: Path) -> None:
    if files:
        pictures = to_pil(torch.stack([load_square(file, px) for file in files]))
        save_png(captioned_sheet(pictures, words), path)
    else:
        path.unlink(missing_ok=True)  # of an earlier run
