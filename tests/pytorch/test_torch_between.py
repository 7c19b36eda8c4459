"""What happens between a fused norm and its activation: other code, other threads, errors, statistics that are read."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from typing import Any

import pytest
from torch_cases import as_found, data, randomized, torch
from torch_fusing import SHAPE, Block, check, doubled, fused, given

import fastbn.torch

__all__ = ["as_found"]
nn = torch.nn


def block(forward: Any, **attributes: Any) -> Any:
    model = randomized(Block(forward)).double()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def same(theirs: Any, ours: Any) -> None:
    """Compares models whose arguments are data, in training."""
    check(theirs.train(), ours.train())


# What is read, and then exchanged by other code, before the norm is called -------------------------------------------


def exchanged(s: Any, x: Any) -> Any:
    vars(s)["way"] = given
    return x


def called_later(s: Any, x: Any) -> Any:
    return torch.relu(s.way(s.bn(exchanged(s, x))))


def waited(s: Any, way: Any, x: Any) -> Any:
    return torch.relu(way(s.bn(x)))


def given_first(s: Any, x: Any) -> Any:
    return waited(s, s.way, exchanged(s, x))


def given_second(s: Any, x: Any) -> Any:
    return waited(s, s.way, exchanged(s, exchanged(s, x) if s.number > 1 else x))


def read_between(s: Any, x: Any) -> Any:
    h = s.act(exchanged(s, x))
    return waited(s, s.way, exchanged(s, h))


@pytest.mark.parametrize("forward", [called_later, given_first, given_second, read_between])
def test_what_was_read_before(forward: Any) -> None:
    """A function that the forward holds is not the one that the attribute has when the norm is called."""
    theirs = block(forward, way=given, number=0)
    ours = fused(theirs)
    x = data(SHAPE, dtype=torch.float64)
    for model in (theirs, ours):
        model(x)
        model.number = 2
        vars(model)["way"] = doubled
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


class Doubling(nn.Module):  # type: ignore[misc]
    def forward(self, y: Any) -> Any:
        return doubled(y)


class Exchanging(nn.Module):  # type: ignore[misc]
    """Gives a list of modules another, while a loop runs over the first."""

    def __init__(self, lists: Any) -> None:
        super().__init__()
        self.lists = lists

    def forward(self, x: Any) -> Any:
        owner, mine = self.lists
        owner.layers = mine
        return x


def looped(s: Any, x: Any) -> Any:
    for module in s.layers:
        x = module(x)
    return x


def test_a_loop_goes_on_with_its_list() -> None:
    found = []
    x = data(SHAPE, dtype=torch.float64)
    for converts in (False, True):
        torch.manual_seed(0)
        model = block(looped)
        exchanging = Exchanging([])
        norm = model._modules.pop("bn")
        mine = nn.ModuleList([exchanging, norm, nn.ReLU()])
        exchanging.lists[:] = model, mine
        model.layers = mine
        if converts:
            model = fused_itself(model)
        model.layers = nn.ModuleList([exchanging, norm, Doubling()])
        found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def fused_itself(model: Any) -> Any:
    return fastbn.torch.convert_batchnorm(model, fuse=True)


# What modifies the norm's input, or looks at what waits --------------------------------------------------------------


def multiplied(s: Any, x: Any) -> Any:
    h = s.conv(x)
    y = s.bn(h)
    if s.number > 1:
        h.__imul__(2)
    return torch.relu(y)


def given_item(s: Any, x: Any) -> Any:
    h = s.conv(x)
    y = s.bn(h)
    if s.number > 1:
        h.__setitem__(0, 2.0)
    return torch.relu(y)


def by_max(s: Any, x: Any) -> Any:
    h = s.conv(x)
    y = s.bn(h)
    if s.number > 1:
        one = h[0, 0, 0, 0]
        max(one, one).mul_(2)
    return torch.relu(y)


def added_to(h: Any, y: Any, number: int) -> Any:
    if number > 1:
        h.mul_(2)
    return torch.relu(y)


def as_argument(s: Any, x: Any) -> Any:
    h = s.conv(x)
    return added_to(h, s.bn(h), s.number)


def in_tuple(s: Any, x: Any) -> Any:
    h = s.conv(x)
    h, y = h, s.bn(h)
    if s.number > 1:
        h.mul_(2)
    return torch.relu(y)


@pytest.mark.parametrize("forward", [multiplied, given_item, by_max, as_argument, in_tuple])
def test_inputs_that_are_modified(forward: Any) -> None:
    theirs = block(forward, number=0)
    ours = fused(theirs)
    x = data(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for number in (0, 2):
            theirs.number = ours.number = number
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


class Asked(type):
    """Its classes see who asks for an instance."""

    def __instancecheck__(cls, other: Any) -> bool:
        y = sys._getframe(1).f_locals.get("y")
        return y is not None and type(y) is not torch.Tensor and type(other) is torch.Tensor


class Odd(metaclass=Asked):
    pass


kind: Any = int


def asks(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    return torch.relu(y) * 2 if isinstance(x, Odd) else torch.relu(y)


def asks_for_global(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    if isinstance(x, kind):
        x = x * 2
    return torch.relu(y + x)


@pytest.mark.parametrize("forward", [asks, asks_for_global])
def test_isinstance_may_run_code(forward: Any, monkeypatch: Any) -> None:
    theirs = block(forward)
    ours = fused(theirs)
    monkeypatch.setitem(globals(), "kind", Odd)
    same(theirs, ours)


class Tripling:
    def __radd__(self, other: Any) -> Any:
        return other * 3


def tagged(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return torch.relu(y + x.tag) if s.number > 1 else torch.relu(y)


def test_attributes_of_tensors_may_be_anything() -> None:
    theirs = block(tagged, number=0)
    ours = fused(theirs)
    theirs.number = ours.number = 2
    x = data(SHAPE, dtype=torch.float64)
    x.tag = Tripling()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


# Running statistics --------------------------------------------------------------------------------------------------


class Read(nn.Module):  # type: ignore[misc]
    """Reads what it is given, or a buffer, while the result waits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()
        self.register_buffer("other", torch.ones(6))

    def forward(self, x: Any, mean: Any = None) -> Any:
        y = self.bn(self.conv(x))
        z = x * (self.other if mean is None else mean).view(1, -1, 1, 1)
        return self.act(y + z)


@pytest.mark.parametrize("which", ["argument", "set_", "data", "data of the other", "parameter"])
def test_statistics_under_other_names(which: str) -> None:
    results = []
    x = data(SHAPE, dtype=torch.float64)
    for converts in (False, True):
        torch.manual_seed(0)
        model = randomized(Read()).double()
        norm = model.bn
        if which == "parameter":
            del model._buffers["other"]
            model.other = nn.Parameter(norm.running_mean, requires_grad=False)
        if converts:
            model = fused_itself(model)
        if which == "set_":
            model.other.set_(norm.running_mean)
        elif which == "data":
            model.other.data = norm.running_mean
        elif which == "data of the other":
            norm.running_mean.data = model.other
        given_too = (norm.running_mean,) if which == "argument" else ()
        results.append(model(x, *given_too))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("later", [False, True])
def test_two_norms_with_the_same_statistics(later: bool) -> None:
    """They take the batches in the order of the calls."""

    def share(model: Any) -> None:
        for name in ("running_mean", "running_var"):
            setattr(model.bn2, name, getattr(model.bn, name))

    theirs = randomized(Block(lambda s, x: torch.relu(s.bn(s.conv(x)) + s.bn2(x)), bn2=nn.BatchNorm2d(6))).double()
    if not later:
        share(theirs)
    ours = fused(theirs)
    share(theirs)
    share(ours)
    same(theirs, ours)


def fails(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    if s.number > 1:
        raise ValueError("no")
    return torch.relu(y)


def fails_in_torch(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    return torch.relu(y + x[:, : s.number + 1])


@pytest.mark.parametrize("forward", [fails, fails_in_torch])
def test_errors_after_a_norm(forward: Any) -> None:
    """The norm was called, so that it has had the batch."""
    theirs = block(forward, number=0)
    ours = fused(theirs, "fused with")
    theirs.number = ours.number = 2
    x = data(SHAPE, dtype=torch.float64)
    for model in (theirs, ours):
        with pytest.raises((ValueError, RuntimeError), match=r"no|must match"):
            model(x)
    assert float(ours.bn.num_batches_tracked) == 1
    torch.testing.assert_close(ours.bn.running_mean, theirs.bn.running_mean, rtol=1e-9, atol=1e-9)


def test_the_error_of_the_norm_comes_first() -> None:
    theirs = block(lambda s, x: torch.relu(s.bn(x.clone()) + s.conv(x)[:, :, :1]))
    ours = fused(theirs)
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="running_mean should contain 5"):
            model(data((4, 5, 5, 3), dtype=torch.float64))


def summed(s: Any, x: Any) -> Any:
    out = s.bn(s.conv(x))
    out += s.conv(x)
    return s.act(out)


def test_threads_that_train_one_model() -> None:
    """Others may update the running statistics while a result waits."""
    model = fused(block(summed), "fused with the addition and relu")
    errors: list[str] = []
    inside = threading.Barrier(3, timeout=30)

    def work() -> None:
        try:
            for _ in range(20):
                inside.wait()
                model(data(SHAPE, dtype=torch.float64))
        except Exception as error:
            errors.append(str(error))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors


def test_the_signature_is_the_models() -> None:
    model = Read()
    wanted = inspect.signature(model.forward)
    assert inspect.signature(fused_itself(model).forward) == wanted


def other_parts(s: Any, x: Any) -> Any:
    return s.act(s.bn(s.part(x)) + x)


def test_other_code_before_the_norm() -> None:
    """An activation that was read before code that cannot be followed is still fused, unless it was another."""
    theirs = randomized(Block(other_parts, part=Unread())).double()
    ours = fused(theirs, "fused with the addition and relu")
    check(theirs, ours)
    check(copy.deepcopy(theirs), copy.deepcopy(ours))
    theirs.act, ours.act = Doubling(), Doubling()
    check(theirs, ours)


class Unread(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            return x * 2
