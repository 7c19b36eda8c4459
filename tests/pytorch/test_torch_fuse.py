"""Does convert_batchnorm(fuse=True) fuse what it may, and nothing else, and are the results those of the model?"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import itertools
import operator
import sys
from typing import Any

import pytest
from torch_cases import FORMATS, Residual, as_found, data, network, randomized, torch
from torch_fusing import FUSED, SHAPE, Block, check, fused, graph_of, in_place, lenient, report_of
from torch_others import BatchNormAct2d, FrozenBatchNorm2d, importable

import fastbn.torch

__all__ = ["as_found", "importable", "lenient"]
nn = torch.nn
functional = torch.nn.functional


def asked(y: Any) -> Any:
    return y * 2 if isinstance(y, torch.Tensor) else y


NOT_FUSED = {
    "used twice": (lambda s, x: (lambda y: y + torch.relu(y))(s.bn(x)), "its result is used 2 times"),
    "returned, too": (lambda s, x: (lambda y: (torch.relu(y), y))(s.bn(x)), "its result is used 2 times"),
    "twice itself": (lambda s, x: (lambda y: y + y)(s.bn(x)), "add follows it"),
    "shape": (lambda s, x: (lambda y: torch.relu(y) * y.shape[0])(s.bn(x)), "its result is used 2 times"),
    "alpha": (lambda s, x: torch.add(s.bn(x), x, alpha=2), "add follows it"),
    "a number": (lambda s, x: s.bn(x) + 1, "add follows it"),
    "into the other": (lambda s, x: torch.relu(in_place(x * 1, s.bn(x))), "iadd follows it"),
    "its class asked for": (lambda s, x: torch.relu(asked(s.bn(x))), "gives the result to isinstance()"),
    "its class asked for in evaluation": (
        lambda s, x: torch.relu(asked(s.bn(x)) if not s.training else s.bn(x)),
        "gives the result to isinstance()",
    ),
    "tanh": (lambda s, x: torch.tanh(s.bn(x)), "tanh follows it"),
    "clipped": (lambda s, x: functional.hardtanh(s.bn(x), -1.0, 6.0), "hardtanh follows it"),
    "called twice": (lambda s, x: torch.relu(s.bn(torch.relu(s.bn(x)))), "it is called 2 times"),
    "alone": (lambda s, x: s.bn(x), "its result leaves Block"),
    "untraceable": (lambda s, x: torch.relu(s.bn(x)) if x.sum() > 0 else s.bn(x), "cannot record Block"),
    "input shared": (lambda s, x: (lambda z: s.act(s.bn(z) + z.mul_(2)))(s.conv(x)), "which might change its input"),
    "input a view": (lambda s, x: (lambda z: s.act(s.bn(z[:]) + z.mul_(2)))(s.conv(x)), "which might change its input"),
    "after the sum": (
        lambda s, x: (lambda z: (lambda y, w: s.act(y) + w)(s.bn(s.conv(x)) + z, z.mul_(2)))(x * 1),
        "which might change its input",
    ),
}


# Code that could tell -------------------------------------------------------------------------------------------------

kind = type


def doubled(y: Any) -> Any:
    return y * 2 if type(y) is torch.Tensor else y


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


class Doubling(nn.Module):  # type: ignore[misc]
    """Passes on what stands for a tensor, and doubles a tensor."""

    def forward(self, y: Any) -> Any:
        return doubled(y)


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


def test_tracing_goes_on() -> None:
    """Whoever traces Python code, such as a debugger, does so again after a forward was recorded."""
    before = sys.gettrace()

    def trace(*_: Any) -> None:
        """Watches calls alone."""

    sys.settrace(trace)
    try:
        fused(Block(FUSED["module"][0]), "fused with relu")
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", FUSED)
def test_fused(which: str, place: str) -> None:
    """What follows is no node of its own, and all numbers are the model's."""
    forward, words = FUSED[which]
    theirs = randomized(Block(forward)).double().to(memory_format=FORMATS[place])
    ours = fused(theirs, f"converted; fused with {words}")
    check(theirs, ours, place=place)
    names = graph_of(ours(data(SHAPE, place, torch.float64).requires_grad_()))
    assert "NormalizationBackward" in names
    apart = {"AddBackward0", "ReluBackward0", "HardtanhBackward0", "SiluBackward0", "HardswishBackward0"}
    apart |= {"LeakyReluBackward0"} if "sigmoid" not in which else {"SigmoidBackward0"}
    assert names.isdisjoint(apart) or which == "sum used twice"


@pytest.mark.parametrize("which", NOT_FUSED)
def test_not_fused(which: str) -> None:
    """The report says why, and no forward is replaced."""
    forward, words = NOT_FUSED[which]
    theirs = randomized(Block(forward)).double()
    ours = fused(theirs, words)
    assert "fused with" not in str(report_of(theirs))
    assert not any("forward" in vars(module) for module in ours.modules())
    x = data(SHAPE, dtype=torch.float64)
    if which == "untraceable":
        ours.run, theirs.run = FUSED["module"][0], FUSED["module"][0]
    if not which.startswith("input"):
        check(theirs, ours)
    with torch.no_grad():  # with gradients, autograd refuses inputs that change
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["timm", "frozen", "own", "act"])
def test_other_norms(norm: str) -> None:
    """Of timm without an activation, of torchvision, and fastbn's own."""
    layers = {
        "timm": BatchNormAct2d(6),
        "frozen": FrozenBatchNorm2d(6),
        "own": nn.BatchNorm2d(6, affine=False),
        "act": BatchNormAct2d(6, nn.SiLU()),
    }
    theirs = randomized(Block(FUSED["around"][0], layers[norm])).double()
    ours = fused(theirs, "its SiLU; not fused: it has an activation of its own" if norm == "act" else "fused with")
    check(theirs, ours)
    assert fused(nn.Sequential(fastbn.torch.BatchNorm2d(6), nn.ReLU()), "already; fused with relu")


def test_subclasses_of_fastbns_layers() -> None:
    """Their forwards may be anything."""

    class Mine(fastbn.torch.BatchNorm2d):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    model = nn.Sequential(Mine(6), nn.ReLU())
    check(model.double(), fused(model, "its class has a forward of its own"))


def test_sequentials() -> None:
    """Within others, and as the inner part of a block, whose addition is outside."""
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), nn.ReLU6(), nn.Conv2d(6, 6, 1))
    last = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    block = Block(lambda s, x: s.act(x + s.deep(x)), deep=nn.Sequential(inner, last))
    theirs = randomized(nn.Sequential(block, nn.Sequential(nn.BatchNorm2d(6), nn.Identity()), nn.LeakyReLU())).double()
    report: list[Any] = []
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), fuse=True, report=report)
    assert [entry.note for entry in report] == [
        "converted; not fused: no forward that torch.fx can record calls it",
        "converted; fused with relu6",
        "converted; fused with the addition and relu",
        "converted; fused with leaky_relu",
    ]
    check(theirs, ours)
    x = data(SHAPE, dtype=torch.float64)
    for part in ("0.deep.0.0", "0.deep", "0.deep.1.1", "1"):  # a part by itself gives tensors, and the model's
        found, wanted = (model.eval().get_submodule(part)(x) for model in (ours, theirs))
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_arguments_with_defaults() -> None:
    """The way that the forward takes by default is fused; with other arguments the numbers are right, too."""

    class Optional(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Any, shift: Any = None, *, scale: float = 1.0) -> Any:
            y = self.bn(x)
            if shift is not None:
                y = y * shift
            return torch.relu(y) if scale == 1.0 else torch.relu(y) * scale

    theirs = randomized(Optional()).double()
    ours = fused(theirs, "fused with relu")
    check(theirs, ours)
    x = data(SHAPE, dtype=torch.float64)
    for args, kwargs in (((x, x), {}), ((x,), {"scale": 2.0}), ((), {"x": x, "shift": 2.0})):
        torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs), rtol=1e-9, atol=1e-9)


class Given(nn.Module):  # type: ignore[misc]
    """Gives its input on."""

    def forward(self, x: Any) -> Any:
        return x


class Rectified(nn.Module):  # type: ignore[misc]
    """A ReLU of a model's own."""

    def forward(self, x: Any) -> Any:
        return functional.relu(x)


@pytest.mark.parametrize("where", ["given", "rect"])
def test_modules_that_the_result_passes(where: str) -> None:
    """Fused, until one of them has a hook, which sees a tensor."""
    theirs = randomized(Block(lambda s, x: s.rect(s.given(s.bn(s.conv(x)))), given=Given(), rect=Rectified())).double()
    ours = fused(theirs, "fused with relu")
    check(theirs, ours)
    x, seen = data(SHAPE, dtype=torch.float64).requires_grad_(), []
    assert ours(x).grad_fn.name() == "NormalizationBackward"
    getattr(ours, where).register_forward_hook(lambda module, args, y: seen.extend((args[0], y)))
    assert ours(x).grad_fn.name() == "ReluBackward0"
    assert all(type(one) is torch.Tensor for one in seen)
    assert len(seen) == 2


def test_two_norms_in_one_sum() -> None:
    """One of them takes the other's result as its residual."""
    around = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    theirs = randomized(Block(lambda s, x: s.act(s.bn(s.conv(x)) + s.around(x)), around=around)).double()
    ours = fused(theirs, "the addition that follows is fused with another norm")
    check(theirs, ours)


def test_whole_networks() -> None:
    """The residual blocks of the other tests, whose norms are in containers."""
    theirs = network().double()
    report: list[Any] = []
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), fuse=True, report=report)
    notes = [entry.note.removeprefix("converted; ") for entry in report]
    assert notes == ["fused with relu", *["fused with relu", "fused with the addition and relu"] * 2, notes[-1]]
    check(theirs, ours, (4, 3, 8, 8))


def test_only_forwards_are_replaced() -> None:
    """Objects, classes, state and text stay; reverting takes the forwards away; twice is once."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Residual(3))
    before = [(id(module), type(module), set(vars(module))) for module in model.modules()]
    text, state = repr(model), list(model.state_dict())
    fastbn.torch.convert_batchnorm(model, fuse=True)
    changed = {name: set(vars(module)) for name, module in model.named_modules()}
    assert [name for name, own in changed.items() if "forward" in own] == [
        "",
        "1",
        "3",
        "3.norms.first",
        "3.norms.second",
    ]
    assert repr(model) == text
    assert list(model.state_dict()) == state
    forwards = [vars(module).get("forward") for module in model.modules()]
    report: list[Any] = []
    fastbn.torch.convert_batchnorm(model, fuse=True, report=report)
    fastbn.torch.convert_batchnorm(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert {entry.note for entry in report} == {"fastbn's already; fused before"}
    fastbn.torch.revert_batchnorm(model)
    assert [(id(module), type(module), set(vars(module))) for module in model.modules()] == before


def test_forwards_that_a_model_has_stay() -> None:
    theirs = Block(FUSED["module"][0])
    theirs.forward = lambda x: x * 2
    mine = theirs.forward
    fastbn.torch.convert_batchnorm(theirs, fuse=True)
    assert theirs.forward is mine
    fastbn.torch.revert_batchnorm(theirs)
    assert theirs.forward is mine
