"""What do the tests of fusing share? Blocks, and the comparison of a model with its conversion."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch_cases import data, torch

import fastbn.torch

nn = torch.nn
functional = torch.nn.functional
SHAPE = (4, 6, 5, 3)


@pytest.fixture
def lenient() -> Iterator[None]:
    """Torch may warn of what is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


class Block(nn.Module):  # type: ignore[misc]
    """A convolution and a norm, and a forward that a test gives."""

    def __init__(self, forward: Any, norm: Any = None, **more: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)
        self.bn = nn.BatchNorm2d(6) if norm is None else norm
        self.act, self.gate = nn.ReLU(inplace=True), nn.Sigmoid()
        for name, module in more.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def given(y: Any) -> Any:
    return y


def doubled(y: Any) -> Any:
    return y * 2 if type(y) is torch.Tensor else y


class Doubling(nn.Module):  # type: ignore[misc]
    """Doubles a tensor, and passes on what stands for one."""

    def forward(self, y: Any) -> Any:
        return doubled(y)


def in_place(norm: Any, x: Any) -> Any:
    out = norm
    out += x
    return out


def doubly(s: Any, x: Any) -> Any:
    y = s.bn(x) + x
    return y * s.act(y.clone())


FUSED = {
    "module": (lambda s, x: s.act(s.bn(s.conv(x))), "relu"),
    "torch.relu": (lambda s, x: torch.relu(s.bn(s.conv(x))), "relu"),
    "F.relu in place": (lambda s, x: functional.relu(s.bn(s.conv(x)), inplace=True), "relu"),
    "method": (lambda s, x: s.bn(s.conv(x)).relu(), "relu"),
    "method in place": (lambda s, x: s.bn(s.conv(x)).relu_(), "relu"),
    "relu6": (lambda s, x: functional.relu6(s.bn(x)), "relu6"),
    "hardtanh": (lambda s, x: functional.hardtanh(s.bn(x), 0.0, 6.0), "relu6"),
    "silu": (lambda s, x: functional.silu(s.bn(x), inplace=True), "silu"),
    "hardswish": (lambda s, x: functional.hardswish(s.bn(x)), "hardswish"),
    "sigmoid": (lambda s, x: torch.sigmoid(s.bn(x)), "sigmoid"),
    "module sigmoid": (lambda s, x: s.gate(s.bn(x)), "sigmoid"),
    "method sigmoid": (lambda s, x: s.bn(x).sigmoid(), "sigmoid"),
    "leaky": (lambda s, x: functional.leaky_relu(s.bn(x), 0.3), "leaky_relu"),
    "sum": (lambda s, x: s.bn(s.conv(x)) + x, "the addition"),
    "sum the other way": (lambda s, x: x + s.bn(s.conv(x)), "the addition"),
    "of itself": (lambda s, x: x + s.bn(x), "the addition"),
    "torch.add": (lambda s, x: torch.add(x, s.bn(x)).relu(), "the addition and relu"),
    "method add_": (lambda s, x: s.bn(s.conv(x)).add_(x).relu_(), "the addition and relu"),
    "in place": (lambda s, x: s.act(in_place(s.bn(s.conv(x)), x)), "the addition and relu"),
    "operator": (lambda s, x: s.act(operator.iadd(s.bn(s.conv(x)), x)), "the addition and relu"),
    "around": (lambda s, x: s.act(s.bn(s.conv(x)) + torch.sigmoid(s.conv(x))), "the addition and relu"),
    "sum used twice": (doubly, "the addition"),
}


def graph_of(y: Any) -> set[str]:
    """The names of the nodes of autograd's graph."""
    found, left = {}, [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            left += [other for other, _ in node.next_functions]
    return {node.name() for node in found.values()}


def passes(model: Any, x: Any) -> dict[str, Any]:
    """Results, gradients and buffers of a model in training, then in eval mode, with gradients and without."""
    found: dict[str, Any] = {}
    for training in (True, False):
        model.train(training)
        one = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = model(one * 1)
        ys = y if isinstance(y, tuple) else (y,)
        grads = torch.autograd.grad(
            sum((part * (i + 1)).pow(3).mean() for i, part in enumerate(ys)),
            (one, *model.parameters()),
            allow_unused=True,
        )
        found |= {f"y{i} {training}": part.detach() for i, part in enumerate(ys)}
        found |= {f"{training} {i}": grad for i, grad in enumerate(grads) if grad is not None}
    with torch.no_grad():
        torch.manual_seed(1)
        found["no_grad"] = model(x.clone())
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def fused(model: Any, expected: str = "") -> Any:
    """A copy of the model, converted. `expected` is in a note of the report."""
    notes = report_of(model)
    assert not expected or any(expected in note for note in notes), notes
    return fastbn.torch.convert_batchnorm(copy.deepcopy(model), fuse=True)


def report_of(model: Any) -> list[str]:
    """What is said of a copy of the model."""
    report: list[Any] = []
    fastbn.torch.convert_batchnorm(copy.deepcopy(model), fuse=True, report=report)
    return [str(entry) for entry in report]


def check(theirs: Any, ours: Any, shape: tuple[int, ...] = SHAPE, place: str = "contiguous") -> None:
    x = data(shape, place, torch.float64)
    found, wanted = passes(ours, x), passes(theirs, x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
