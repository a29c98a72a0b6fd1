"""The average of the weights against one written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.ema import EMA


def reference(history: list[Tensor], decay: float) -> Tensor:
    """Scalar arithmetic in float64: e <- d e + (1 - d) w, d = min(decay, (1 + n) / (10 + n))."""
    average = history[0].double()
    for n, weight in enumerate(history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight.double()
    return average


def test_average_of_a_random_walk() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(net, 0.8)
    history = {name: [p.detach().clone()] for name, p in net.named_parameters()}
    for _ in range(60):  # the decay has reached its maximum after 31
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.add_(torch.randn_like(p))
                history[name].append(p.detach().clone())
        ema.update()
    assert ema.updates == 60
    for name, weights in history.items():
        assert torch.allclose(ema.average[name].double(), reference(weights, 0.8), atol=1e-5), name


def test_the_first_average_forgets_its_random_start() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.9999)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    ema.update()
    assert torch.allclose(ema.average["weight"], start + 9 / 11)


def test_names_buffers_and_loading() -> None:
    net = nn.BatchNorm1d(2)
    ema = EMA(net, 0.5)
    net(torch.randn(8, 2))
    with torch.no_grad():
        net.weight.fill_(3.0)
    ema.update()
    state = ema.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert torch.equal(
        state["running_mean"], net.get_buffer("running_mean")
    )  # buffers are the network's of now
    other = EMA(nn.BatchNorm1d(2), 0.5)
    other.load_state_dict(state, ema.updates)
    assert other.updates == 1
    assert torch.equal(other.average["weight"], ema.average["weight"])
    assert other.average["weight"] is not state["weight"]


def test_the_average_is_float32_whatever_the_network_is() -> None:
    net = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(net, 0.999)
    ema.update()
    assert all(tensor.dtype == torch.float32 for tensor in ema.average.values())
