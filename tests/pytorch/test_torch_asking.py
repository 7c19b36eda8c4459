"""Is nothing fused where code could tell what waits from a tensor, and are the results right if it comes later?"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import itertools
import operator
from typing import Any

import pytest
from torch_cases import as_found, data, randomized, torch
from torch_fusing import FUSED, SHAPE, Block, Doubling, check, doubled, fused, report_of

__all__ = ["as_found"]
nn = torch.nn


kind = type


def is_plain(y: Any) -> bool:
    return type(y) is torch.Tensor


def by_default(y: Any, of: Any = type) -> Any:
    return y * 2 if of(y) is torch.Tensor else y


def by_import(y: Any) -> Any:
    from builtins import type as of

    return y * 2 if of(y) is torch.Tensor else y


def by_closure() -> Any:
    of = type
    return lambda y: y * 2 if of(y) is torch.Tensor else y


def by_match(y: Any) -> Any:
    match y:
        case torch.Tensor():
            return y * 2
        case _:
            return y


@functools.singledispatch
def by_dispatch(y: Any) -> Any:
    return y


@by_dispatch.register
def _(y: torch.Tensor) -> Any:
    return y * 2


def by_error(y: Any) -> Any:
    try:
        return torch.Tensor.mul(y, 2)
    except TypeError:
        return y


def by_suppressed_error(y: Any) -> Any:
    with contextlib.suppress(TypeError):
        y = torch.Tensor.mul(y, 2)
    return y


def by_fallback(s: Any, x: Any) -> Any:
    try:
        y = s.bn(x)
    except ValueError:
        y = x
    return torch.relu(y)


def changing(**values: Any) -> Any:
    """A forward that changes attributes of the norm for its call alone."""

    def forward(s: Any, x: Any) -> Any:
        before = {name: vars(s.bn)[name] for name in values}
        vars(s.bn).update(values)
        y = s.bn(x)
        vars(s.bn).update(before)
        return torch.relu(y)

    return forward


CHANGES = {"training": False, "eps": 1.0, "momentum": 0.9, "track_running_stats": False, "_parameters": {}}


class Doubler:
    of = type

    def __call__(self, y: Any) -> Any:
        return y * 2 if self.of(y) is torch.Tensor else y

    @staticmethod
    def static(y: Any) -> Any:
        return doubled(y)

    def method(self, y: Any) -> Any:
        return y * 2 if is_plain(y) else y


class DropPath(Doubling):
    """A layer of this name is not run while a forward is recorded."""


ASKING = {
    "type": lambda y: y * 2 if type(y) is torch.Tensor else y,
    "==": lambda y: y * 2 if type(y) == torch.Tensor else y,  # noqa: E721
    "in": lambda y: y * 2 if type(y) in (torch.Tensor, nn.Parameter) else y,
    "name": lambda y: y * 2 if type(y).__name__ == "Tensor" else y,
    "issubclass": lambda y: y * 2 if issubclass(type(y), torch.Tensor) else y,
    "alias": lambda y: y * 2 if kind(y) is torch.Tensor else y,
    "builtins": lambda y: y * 2 if builtins.type(y) is torch.Tensor else y,
    "getattr": lambda y: y * 2 if getattr(builtins, "type")(y) is torch.Tensor else y,  # noqa: B009
    "map": lambda y: y * 2 if next(map(type, [y])) is torch.Tensor else y,
    "any": lambda y: y * 2 if any(type(one) is torch.Tensor for one in (y,)) else y,
    "dict": lambda y: {torch.Tensor: lambda z: z * 2}.get(type(y), lambda z: z)(y),
    "eval": lambda y: eval("y * 2 if type(y) is torch.Tensor else y", {"torch": torch}, {"y": y}),
    "class of a class": lambda y: y * 2 if (0).__class__.__class__(y) is torch.Tensor else y,
    "has_torch_function": lambda y: y if torch.overrides.has_torch_function((y,)) else y * 2,
    "proxy": lambda y: y if isinstance(y, torch.fx.Proxy) else y * 2,
    "default": by_default,
    "import": by_import,
    "closure": by_closure(),
    "partial": functools.partial(doubled),
    "static": Doubler.static,
    "method": Doubler().method,
    "attribute": Doubler(),
    "error": by_error,
    "suppressed": by_suppressed_error,
    "__class__": lambda y: y * 2 if y.__class__ is torch.Tensor else y,
    "isinstance": lambda y: y * 2 if isinstance(y, torch.Tensor) else y,
    "is_tensor": lambda y: y * 2 if torch.is_tensor(y) else y,
    "typename": lambda y: y * 2 if torch.typename(y) == "torch.DoubleTensor" else y,
    "attrgetter": lambda y: y * 2 if operator.attrgetter("__class__")(y) is torch.Tensor else y,
    "match": by_match,
    "singledispatch": by_dispatch,
}
"""They double a tensor, and nothing else."""

TELLS = "could tell that it waits"


def by_identity(s: Any, y: Any) -> Any:
    z = s.act(y)
    return z * 2 if z is y else z


def by_id(s: Any, y: Any) -> Any:
    z = s.act(y)
    return z * 2 if id(z) == id(y) else z


def by_operator(s: Any, y: Any) -> Any:
    z = s.act(y)
    return z * 2 if operator.is_(z, y) else z


def by_key(s: Any, y: Any) -> Any:
    z = s.act(y)
    return z * 2 if z in {y: 1} else z


def by_list(s: Any, y: Any) -> Any:
    z = s.act(y)
    return z * 2 if [z] == [y] else z


def by_closure_within(s: Any, y: Any) -> Any:
    def same(z: Any) -> bool:
        return z is y

    z = s.act(y)
    return z * 2 if same(z) else z


def afterwards(s: Any, y: Any) -> Any:
    z = torch.relu(y)
    return z * 2 if is_plain(z) else z


def by_locals(s: Any, y: Any) -> Any:
    z = torch.relu(y)
    return z * 2 if type(locals()["y"]) is torch.Tensor else z


def by_statistics(s: Any, y: Any) -> Any:
    m = s.bn.running_mean.mean()
    return torch.relu(y) * m


def by_buffers(s: Any, y: Any) -> Any:
    m = s.bn._buffers["running_mean"].mean()
    return torch.relu(y) * m


def by_state(s: Any, y: Any) -> Any:
    m = s.state_dict()["bn.running_mean"].mean()
    return torch.relu(y) * m


def by_keeping(s: Any, y: Any) -> Any:
    s.last = y
    return torch.relu(y)


def by_training(s: Any, y: Any) -> Any:
    if s.training:
        y = doubled(y)
    return torch.relu(y)


WHILE = "while the result waits"
TELLING = (TELLS, WHILE, "asks for", "compares the result", "puts the result into", "is used 2 times")
RESULT = {
    "identity": (by_identity, "compares the result by its identity"),
    "id": (by_id, WHILE),
    "operator": (by_operator, TELLS),
    "key": (by_key, "puts the result into a dict"),
    "list": (by_list, "cannot record Block"),
    "closure within": (by_closure_within, "has a function within that sees y"),
    "afterwards": (afterwards, WHILE),
    "locals": (by_locals, WHILE),
    "of the sum": (lambda s, y: torch.relu(doubled(y + 1)), "add follows it"),
    "kept": (by_keeping, TELLS),
    "in training": (by_training, TELLS),
    "statistics": (by_statistics, "other operations run before what follows it"),
    "buffers": (by_buffers, "reads _buffers of BatchNorm2d"),
    "state": (by_state, WHILE),
}
"""What else could tell, of the norm's result, with what the report says."""

RIGHT = {
    "hasattr": lambda s, y: torch.relu(y if hasattr(y, "node") else y * 2),
    "overridable": lambda s, y: torch.relu(y if hasattr(y, "__torch_function__") else y * 2),
    "text": lambda s, y: torch.relu(y * 2 if repr(y).startswith("tensor") else y),
    "data": lambda s, y: (setattr(y, "data", y.data * 2), torch.relu(y))[1],
    "attribute": lambda s, y: (setattr(y, "tag", 3), torch.relu(y) * y.tag)[1],
    "vars": lambda s, y: (lambda z: z * 2 if vars(y) == {} else z)(torch.relu(y)),
    "copy": lambda s, y: torch.relu(copy.copy(y)),
    "scripting": lambda s, y: torch.relu(y if torch.jit.is_scripting() or torch.jit.is_tracing() else y * 2),
    "tensor-like": lambda s, y: torch.relu(y * 2 if torch.overrides.is_tensor_like(y) else y),
    "data-dependent": lambda s, y: torch.relu(y * 2) if y.sum() > 0 else torch.relu(y),
    "counter": lambda s, y: torch.relu(y if next(s.counter) % 2 else y * 2),
}
"""Forwards that must be right, whether they are fused or not."""


@pytest.mark.parametrize("which", ASKING)
def test_code_that_could_tell(which: str) -> None:
    """What stands for a tensor must not go where a tensor would go another way."""
    theirs = randomized(Block(lambda s, x: torch.relu(s.way(s.bn(x))))).double()
    theirs.way = ASKING[which]
    assert any(words in str(report_of(theirs)) for words in TELLING)
    check(theirs, fused(theirs))
    assert not any("forward" in vars(module) for module in fused(theirs).modules())
    x = data(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(theirs.eval()(x), torch.relu(theirs.bn(x) * 2))


@pytest.mark.parametrize("which", ASKING)
def test_code_that_could_tell_and_comes_later(which: str) -> None:
    """A function put into a converted model is given tensors, before the first call and after it."""
    theirs = randomized(Block(lambda s, x: torch.relu(s.way(s.bn(x))))).double()
    theirs.way = lambda y: y
    for calls_before in (False, True):
        ours = fused(theirs, "fused with relu")
        if calls_before:
            check(theirs, ours)
        theirs = copy.deepcopy(theirs)
        ours.way = theirs.way = ASKING[which]
        check(theirs, ours)
        theirs.way = lambda y: y


@pytest.mark.parametrize("layer", [Doubling, DropPath])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_modules_that_could_tell(layer: Any, depth: int) -> None:
    """At the conversion, or put there later."""
    part = functools.reduce(lambda inner, _: nn.Sequential(nn.Identity(), inner), range(depth), layer())
    theirs = randomized(Block(lambda s, x: torch.relu(s.part(s.bn(x))), part=part)).double()
    check(theirs, fused(theirs, TELLS))
    theirs.part = nn.Sequential(nn.Identity())
    ours = fused(theirs, "fused with relu")
    ours(data(SHAPE, dtype=torch.float64))
    ours = fused(theirs, "fused with relu")
    ours.part = theirs.part = part
    check(theirs, ours)


@pytest.mark.parametrize("which", RESULT)
def test_results_that_could_be_told(which: str) -> None:
    forward, words = RESULT[which]
    theirs = randomized(Block(lambda s, x: s.way(s, s.bn(x)))).double()
    theirs.way = forward
    theirs.shift = torch.ones(SHAPE, dtype=torch.float64)
    check(theirs, fused(theirs, words))
    assert not any("forward" in vars(module) for module in fused(theirs).modules())


@pytest.mark.parametrize("name", CHANGES)
def test_norms_that_change_for_a_call(name: str) -> None:
    """Not fused, and computed at once if the forward did not do so when it was recorded."""
    value: Any = {"weight": None, "bias": None} if name == "_parameters" else CHANGES[name]
    theirs = randomized(Block(changing(**{name: value}))).double()
    assert "fused with" not in str(report_of(theirs))
    check(theirs, fused(theirs, WHILE))
    theirs.run = FUSED["torch.relu"][0]
    ours = fused(theirs, "fused with relu")
    ours.run = theirs.run = changing(**{name: value})
    check(theirs, ours)


def test_errors_that_are_caught() -> None:
    """A norm in a try statement must raise there."""
    theirs = randomized(Block(by_fallback)).double()
    ours = fused(theirs, "not fused: no call of it can be followed past try in by_fallback")
    check(theirs, ours)
    x = data((6, 6), dtype=torch.float64)
    torch.testing.assert_close(ours(x), torch.relu(x))
    later = fused(Block(lambda s, x: torch.relu(s.bn(x))).double(), "fused with relu")
    later.run = by_fallback
    torch.testing.assert_close(later(x), torch.relu(x))


@pytest.mark.parametrize("which", RIGHT)
def test_odd_forwards(which: str) -> None:
    theirs = randomized(Block(lambda s, x: s.way(s, s.bn(x)))).double()
    theirs.way = RIGHT[which]
    theirs.counter = itertools.count()
    check(theirs, fused(theirs))
