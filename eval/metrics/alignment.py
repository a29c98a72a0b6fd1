"""How well pictures fit their prompts, from embeddings of a joint space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**24  # cosines at a time


def cosine(image: Tensor, text: Tensor) -> Tensor:
    """Cosine of the rows of N D and N D: N, float64."""
    return F.cosine_similarity(image.double(), text.double(), dim=1)


def clip_score(cosines: Tensor) -> Tensor:
    """2.5 max(cosine, 0) (arXiv:2104.08718 eq. 1)."""
    return 2.5 * cosines.clamp(min=0)


def text_ranks(image: Tensor, texts: Tensor, own: Tensor) -> Tensor:
    """Rank of each picture's own text among all texts by cosine, 0 the best: N integers.

    image: N D. texts: P D, all different. own: N integers, the row of each picture's text. A text that ties
    with the own one counts as better, so that a network that tells nothing apart fails."""
    image, texts = F.normalize(image.double(), dim=1), F.normalize(texts.double(), dim=1)
    ranks = []
    for rows in torch.arange(len(image)).split(max(1, BLOCK // len(texts))):
        scores = image[rows] @ texts.T  # n P
        ranks.append((scores >= scores.gather(1, own[rows, None])).sum(dim=1) - 1)
    return torch.cat(ranks)


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """1 where the own text is among the k best, else 0: R@k is its mean."""
    return (ranks < k).double()
