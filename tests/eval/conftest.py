"""State that a run leaves in its process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def own_process_state() -> Iterator[None]:
    """accelerate keeps its state as long as the process lives, and a run sets the number of threads: neither
    may reach the next test."""
    from accelerate.state import PartialState

    threads = torch.get_num_threads()
    yield
    PartialState._reset_state()
    torch.set_num_threads(threads)
