"""Which picture stands at which position of a run. Positions count samples over all of training.

An order is a pure function of its seed and the position: nothing is drawn in turn, so it does not depend on
the number of processes or on where a run was resumed, and it needs no memory.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cascade import random

ROUNDS = 10  # of the Feistel network, as in NIST's FF1 (SP 800-38G): fewer are unfair on a few pictures
MASK, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15  # of 64 bits; 2^64 over the golden ratio


class Order(Protocol):
    """Position in the run -> number of a picture."""

    def __getitem__(self, position: int) -> int: ...

    def replacement(self, position: int, attempt: int) -> int:
        """Another picture for the one at `position`, which cannot be read; attempts count from 1."""
        ...


class Shuffle:
    """A permutation of range(size) in O(1) memory, as a function of its key: a Feistel network on the
    next even power of two, walked until it falls into the range (Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002, section 3)."""

    def __init__(self, size: int, key: int) -> None:
        self._size, self._key = size, key
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits of each half

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(place)
        while True:
            place = self._permute(place)
            if place < self._size:
                return place

    def _permute(self, place: int) -> int:
        low = (1 << self._half) - 1
        left, right = place >> self._half, place & low
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(self._key + number * GOLDEN + right & MASK) & low)
        return left << self._half | right


def mix(x):
    """The step of SplitMix64 (Steele et al. 2014), a bijection of 64 bits: of an int below 2^64, or of an
    array of uint64."""
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Shuffled:
    """Epochs one after another, each a permutation of all of `pictures`."""

    def __init__(self, pictures: np.ndarray, seed: int) -> None:
        self._pictures, self._seed = pictures, seed
        self._epoch: tuple[int, Shuffle] | None = None

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, len(self._pictures))
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = number, Shuffle(len(self._pictures), random.key(self._seed, "epoch", number))
        return int(self._pictures[self._epoch[1][place]])

    def replacement(self, position: int, attempt: int) -> int:
        """Any picture of the set."""
        draw = random.key(self._seed, "replace", position, attempt)
        return int(self._pictures[draw % len(self._pictures)])


class Streamed:
    """Epochs one after another, each reading shards from beginning to end.

    An epoch puts the shards in a keyed order, cuts the row of their pictures into `lanes` spans that differ
    by one picture at most, and shuffles each span in windows of `window`. Its position p is in lane
    p mod lanes: as many processes each read the shards of their own lane, and any other number of
    processes reads the same pictures at the same positions. `pictures`, in ascending order, are those that
    take part; `ends` are the shards' ends among all pictures of the set."""

    def __init__(self, pictures: np.ndarray, ends: np.ndarray, seed: int, window: int, lanes: int) -> None:
        self._pictures, self._seed, self._window = pictures, seed, window
        self._lanes = min(lanes, len(pictures))
        borders = np.concatenate([[0], np.searchsorted(pictures, ends)])  # of the shards among `pictures`
        self._starts, self._counts = borders[:-1], np.diff(borders)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, len(self._pictures))
        start, window, offset = self._place(place)
        size = min(self._window, self._span(place % self._lanes)[1] - start)
        shuffle = Shuffle(size, random.key(self._seed, "window", number, place % self._lanes, window))
        return self._nth(number, start + shuffle[offset])

    def replacement(self, position: int, attempt: int) -> int:
        """One of the pictures of the same window, whose shards are being read."""
        number, place = divmod(position, len(self._pictures))
        start, _, _ = self._place(place)
        end = min(start + self._window, self._span(place % self._lanes)[1])
        return self._nth(number, start + random.key(self._seed, "replace", position, attempt) % (end - start))

    def _span(self, lane: int) -> tuple[int, int]:
        """Where a lane begins and ends in the row of an epoch's pictures."""
        share, rest = divmod(len(self._pictures), self._lanes)
        start = lane * share + min(lane, rest)
        return start, start + share + (lane < rest)

    def _place(self, place: int) -> tuple[int, int, int]:
        """Of a place in the epoch: the start of its window in the row, the window's number in the lane, and
        the place in the window."""
        turn, lane = divmod(place, self._lanes)
        window, offset = divmod(turn, self._window)
        return self._span(lane)[0] + window * self._window, window, offset

    def _nth(self, number: int, place: int) -> int:
        """The picture at a place of the row of epoch `number`, before windows are shuffled."""
        if self._epoch is None or self._epoch[0] != number:
            shards = Shuffle(len(self._counts), random.key(self._seed, "shards", number))
            order = np.array([shards[i] for i in range(len(shards))])
            self._epoch = number, order, np.cumsum(self._counts[order])
        _, order, ends = self._epoch
        at = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[at - 1]) if at else 0
        return int(self._pictures[self._starts[order[at]] + place - before])
