"""Is a result right in every place in which the proof of convert_batchnorm(fuse=True) lets it wait?

What torch.fx says of the forward is left aside: each norm may wait for an addition and an activation.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch_cases import as_found, randomized, torch
from torch_fusing import Block, check

import fastbn.torch
from fastbn.torch import fuse, pending

__all__ = ["as_found"]
nn = torch.nn
functional = torch.nn.functional


def used_twice(s: Any, x: Any) -> Any:
    y = s.bn(x) + x
    z = y.relu()
    return z + y.mean()


def modified(s: Any, x: Any) -> Any:
    y = s.bn(x)
    y += x
    y *= 2
    return y.relu()


def activated_three_times(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return torch.relu(y) + torch.sigmoid(y) + functional.silu(y)


def two_norms(s: Any, x: Any) -> Any:
    y = s.bn(x)
    z = s.other(x)
    return torch.relu(y + z) + (z + y)


def two_names(s: Any, x: Any) -> Any:
    y = s.bn(x)
    z = y
    z += x
    return torch.relu(z) + y


def in_place_and_again(s: Any, x: Any) -> Any:
    y = s.bn(x)
    z = torch.relu_(y)
    return z * y


def operators(s: Any, x: Any) -> Any:
    y = s.bn(x)
    z = -y + (y > 0).to(y.dtype) + 1 / (2 + y * y) + y.abs() + 2 ** -y.abs()
    return z + (y == y).sum() + (3 - y) + (y % 3) + x * y + x / (y * y + 1)


def rows(s: Any, x: Any) -> Any:
    for row in s.bn(x):
        x = x + row.mean()
    return x


def by_value(s: Any, x: Any) -> Any:
    y = s.bn(x)
    y = y if y.mean() > 0 else y * 2
    return torch.relu(y)


def three_terms(s: Any, x: Any) -> Any:
    y = s.bn(x) + s.other(x) + x
    return y.relu_()


def added_in_place(s: Any, x: Any) -> Any:
    y = s.bn(x)
    y.add_(x)
    return torch.relu(y) + y.sum()


def multiplied_in_place(s: Any, x: Any) -> Any:
    y = s.bn(x)
    y.mul_(2)
    return torch.relu(y) + x


def viewed_before(s: Any, x: Any) -> Any:
    y = s.bn(x)
    v = y.view(-1)
    z = torch.relu_(y)
    return z + v.mean()


def with_alpha(s: Any, x: Any) -> Any:
    return torch.add(s.bn(x), x, alpha=2).relu() + torch.add(x, s.other(x))


def on_the_right(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return x.add(y).relu() + x * y


def in_a_loop(s: Any, x: Any) -> Any:
    for _ in range(2):
        x = torch.relu(s.bn(x))
    return x


def beside_new_memory(s: Any, x: Any) -> Any:
    y = s.bn(x)
    n = y.new_zeros(y.shape)
    n.add_(y.detach())
    return torch.relu(y + n)


def of_another_dtype(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return y.to(torch.complex128).real.relu() + y.relu()


def in_chunks(s: Any, x: Any) -> Any:
    y = s.bn(x)
    a, b = y.chunk(2, 1)
    return torch.relu(y) + a.mean() + b.mean()


def transposed(s: Any, x: Any) -> Any:
    y = s.bn(x)
    y = y.transpose(1, 2).transpose(1, 2)
    return y.relu() + x


def with_errors(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if y.shape != x.shape:
        raise ValueError(f"{y.shape}")
    if y.dim() != 4:
        raise ValueError(f"{y.dim()} axes")
    return functional.relu6(y)


def in_a_container(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return s.rest(y) + y


def chosen(s: Any, x: Any) -> Any:
    y = s.bn(x) if s.gate is not None else x
    z = y if y is not None and s.training else y + x
    return functional.leaky_relu(z, negative_slope=0.2)


def helped(y: Any, other: Any, *, slope: float = 0.1) -> Any:
    if other.requires_grad:
        return functional.leaky_relu(y + other, slope)
    return y


def by_function(s: Any, x: Any) -> Any:
    return helped(s.bn(x), x, slope=0.3) + helped(s.other(x), other=x)


def of_no_dimensions(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return x * (float(y.detach().mean()) + int(y.shape[0]) + y.numel() / 100 + bool((y > 0).any()))


WAITS = [used_twice, modified, activated_three_times, two_norms, two_names, in_place_and_again, operators, rows]
WAITS += [by_value, three_terms, added_in_place, multiplied_in_place, viewed_before, with_alpha, on_the_right]
WAITS += [in_a_loop, beside_new_memory, of_another_dtype, in_chunks, transposed, with_errors, in_a_container, chosen]
WAITS += [by_function, of_no_dimensions]


@pytest.mark.parametrize("forward", WAITS)
def test_what_may_wait(forward: Any, monkeypatch: Any) -> None:
    """It waits, and all numbers are the model's."""
    rest = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 6, 1)))
    theirs = randomized(Block(forward, other=nn.BatchNorm2d(6), rest=rest)).double()
    monkeypatch.setattr(
        fuse, "_uses", lambda records, norms: ({norm: fuse._Use(pending.Site(True, True), "all") for norm in norms}, {})
    )
    made: list[Any] = []
    before = pending.Pending.__init__
    monkeypatch.setattr(pending.Pending, "__init__", lambda self, *args: (made.append(args), before(self, *args))[1])
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), fuse=True)
    check(theirs, ours)
    assert any(norm is ours.bn for norm, *_ in made)
