"""Who else could see what waits in a fused model: hooks, tracers, other callers, odd tensors, what changes it?"""

from __future__ import annotations

import ast
import copy
import linecache
import operator
import sys
import threading
from typing import Any

import pytest
from torch_cases import Residual, as_found, data, randomized, torch
from torch_fusing import FUSED, SHAPE, Block, Doubling, check, doubled, fused, given

import fastbn.torch

__all__ = ["as_found"]
nn = torch.nn
functional = torch.nn.functional


def by_attribute(s: Any, x: Any) -> Any:
    return torch.relu(s.way(s.bn(x)))


# Who else could see it -----------------------------------------------------------------------------------------------


def in_hooks(s: Any, x: Any) -> Any:
    y = s.bn(x)
    with torch.autograd.graph.saved_tensors_hooks(s.pack, given):
        return torch.sigmoid(y)


def in_hooks_by_hand(s: Any, x: Any) -> Any:
    y = s.bn(x)
    hooks = torch.autograd.graph.saved_tensors_hooks(s.pack, given)
    hooks.__enter__()
    z = torch.sigmoid(y)
    hooks.__exit__()
    return z


@pytest.mark.parametrize("forward", [in_hooks, in_hooks_by_hand])
def test_hooks_of_saved_tensors(forward: Any) -> None:
    """Around the activation alone they see what it saves, and nothing that the norm saves."""
    theirs = randomized(Block(lambda s, x: torch.sigmoid(s.bn(x)))).double()
    ours = fused(theirs, "fused with sigmoid")
    theirs.run = ours.run = forward
    x, found = data(SHAPE, dtype=torch.float64).requires_grad_(), []
    for model in (theirs, ours, fused(theirs, "not fused")):
        packed: list[Any] = []
        model.pack = lambda value, packed=packed: (packed.append(value.detach().clone()), value)[1]
        model(x).sum().backward()
        found.append(packed)
    assert [len(packed) for packed in found] == [1, 1, 1]
    for packed in found[1:]:
        torch.testing.assert_close(packed[0], found[0][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["settrace", "setprofile"])
def test_tracing(way: str) -> None:
    """Debuggers and profilers that are written in Python see tensors."""
    theirs = randomized(Block(FUSED["in place"][0])).double()
    ours = fused(theirs, "fused with the addition and relu")
    seen: set[type] = set()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        seen.update(map(type, (argument, *frame.f_locals.values())))
        return trace

    x = data(SHAPE, dtype=torch.float64)
    before = getattr(sys, way.replace("set", "get"))()
    getattr(sys, way)(trace)
    try:
        y = ours(x)
    finally:
        getattr(sys, way)(before)
    torch.testing.assert_close(y, theirs(x), rtol=1e-9, atol=1e-9)
    assert torch.Tensor in seen
    assert not any("Pending" in one.__name__ for one in seen)


def test_other_callers() -> None:
    """A norm that is called by code which was not followed gives a tensor, within the forward of its block, too."""
    seen: list[Any] = []

    def calling(layer: Any, args: Any) -> None:
        seen.append(block.bn(args[0]))

    block = fused(Block(FUSED["module"][0]), "fused with relu").eval()
    block.conv.register_forward_pre_hook(calling)
    x = data(SHAPE)
    y = block(x)
    assert type(seen[0]) is torch.Tensor
    assert block(x).requires_grad
    torch.testing.assert_close(y, torch.relu(block.bn(block.conv(x))), rtol=1e-5, atol=1e-5)
    block.run = lambda s, x: s.bn(s.bn(x))
    torch.testing.assert_close(block(x), block.bn(block.bn(x)))


def test_sequentials_that_change() -> None:
    """Modules that are added, removed and swapped are used from then on."""
    theirs = randomized(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())).double()
    ours = fused(theirs, "fused with relu")
    for change in (
        lambda model: model.append(Doubling()),
        lambda model: model.insert(2, Doubling()),
        lambda model: model._modules.update({"2": model._modules.pop("2")}),
        lambda model: model.pop(2),
        lambda model: setattr(model, "_modules", dict(model._modules) | {"2": Doubling()}),
        lambda model: setattr(model, "__class__", Backwards),
    ):
        check(theirs, ours)
        for model in (theirs, ours):
            change(model)
    check(theirs, ours)


class Backwards(nn.Sequential):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        for module in [*self][::-1]:
            x = module(x)
        return x


def test_shallow_copies_of_parts() -> None:
    """A copy of a container has the same norm, and may have others after it."""
    part = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    theirs = randomized(Block(lambda s, x: s.act(s.part(x) + x), part=part)).double()
    ours = fused(theirs, "fused with the addition and relu")
    check(theirs, ours)
    for model in (theirs, ours):
        other = copy.copy(model.part)
        other._modules = dict(model.part._modules) | {"2": Doubling()}
        model.part = other
    check(theirs, ours)


class Odd(torch.Tensor):  # type: ignore[misc]
    """A tensor that looks at what it is added to."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += [type(one) for one in args]
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["sum", "sum the other way", "torch.add", "parameter", "result"])
def test_odd_tensors(which: str) -> None:
    """In a sum with a tensor of a class of its own, it is a tensor, on either side."""
    forward = {
        "parameter": lambda s, x: s.act(s.shift + s.bn(s.conv(x))),
        "result": lambda s, x: s.act(s.part(x) + s.bn(s.conv(x))),
    }.get(which) or FUSED[which][0]
    theirs = randomized(Block(forward, part=nn.Conv2d(6, 6, 1))).double()
    theirs.shift = nn.Parameter(data(SHAPE, dtype=torch.float64))
    ours = fused(theirs, "fused with the addition")
    x = data(SHAPE, dtype=torch.float64)
    Odd.seen.clear()
    if which in ("result", "parameter"):
        tensors = ours.part._parameters if which == "result" else ours._parameters
        name = "weight" if which == "result" else "shift"
        tensors[name] = tensors[name].detach().as_subclass(Odd)
        found = ours(x)
    else:
        found = ours(x.as_subclass(Odd))
    assert not any("Pending" in one.__name__ for one in Odd.seen)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), theirs(x), rtol=1e-9, atol=1e-9)


def test_modes_of_functions() -> None:
    """A mode that sees all functions of torch sees tensors."""
    seen: set[str] = set()

    class Mode(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.update(type(one).__name__ for one in args)
            return function(*args, **(kwargs or {}))

    theirs = randomized(Block(FUSED["in place"][0])).double()
    ours = fused(theirs, "fused with the addition and relu")
    x = data(SHAPE, dtype=torch.float64)
    with Mode():
        y = ours(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-9, atol=1e-9)
    assert "Tensor" in seen
    assert "Pending" not in seen


# What is at hand -----------------------------------------------------------------------------------------------------

WITHOUT = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return torch.relu(self.bn(x))
"""


def test_models_without_source() -> None:
    """They are not fused, and the report says why; a Sequential needs no source."""
    names: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": __name__}
    exec(WITHOUT, names)
    theirs = randomized(nn.Sequential(names["Model"](), nn.BatchNorm2d(6), nn.ReLU())).double()
    check(theirs, fused(theirs, "not fused: no call of it can be followed past Model.forward, whose source is not at"))
    check(theirs, fused(theirs, "1 (BatchNorm2d): converted; fused with relu"))


def test_models_in_notebooks(monkeypatch: Any) -> None:
    """Cells have a source, and are compiled statement by statement."""
    source = "import torch\nfrom torch import nn\n" + WITHOUT
    monkeypatch.setitem(linecache.cache, "<cell>", (len(source), None, source.splitlines(True), "<cell>"))
    names: dict[str, Any] = {"__name__": __name__}
    for statement in ast.parse(source).body:
        exec(compile(ast.Module([statement], []), "<cell>", "exec", dont_inherit=True), names)
    theirs = randomized(names["Model"]()).double()
    check(theirs, fused(theirs, "fused with relu"))


def test_source_that_is_another(tmp_path: Any, monkeypatch: Any) -> None:
    """A file that has changed since it was imported says nothing."""
    file = tmp_path / "model_of_a_test.py"
    file.write_text("import torch\nfrom torch import nn\n" + WITHOUT)
    monkeypatch.syspath_prepend(tmp_path)
    from model_of_a_test import Model  # type: ignore[import-not-found]

    file.write_text("import torch\nfrom torch import nn\n" + WITHOUT.replace("self.bn(x)", "self.bn(1 * x)"))
    theirs = randomized(Model()).double()
    check(theirs, fused(theirs, "whose source is not at hand"))


def test_two_functions_in_a_line() -> None:
    """Each is known by its place."""
    one, other = (lambda s, x: torch.relu(s.bn(x))), (lambda s, x: torch.relu(doubled(s.bn(x))))
    for run, words in ((one, "fused with relu"), (other, "not fused")):
        theirs = randomized(Block(run)).double()
        ours = fused(theirs, words)
        check(theirs, ours)
        ours.run, theirs.run = other, other
        check(theirs, ours)


def test_copies_prove_anew() -> None:
    """What is exchanged in a copy before its first call counts."""
    theirs = randomized(Block(by_attribute)).double()
    theirs.way = given
    ours = copy.deepcopy(fused(theirs, "fused with relu"))
    x = data(SHAPE, dtype=torch.float64).requires_grad_()
    assert copy.deepcopy(ours)(x).grad_fn.name() == "NormalizationBackward"
    theirs.way = ours.way = doubled
    check(theirs, ours)
    again = copy.deepcopy(fused(randomized(Residual(6)).double()))
    assert again(x).grad_fn.name() == "NormalizationBackward"


def test_threads() -> None:
    """What one thread exchanges while another is in the block is used, from the next call of the norm on."""
    inside, done = threading.Event(), threading.Event()

    def waiting(y: Any) -> Any:
        inside.set()
        done.wait(10)
        return y

    theirs = randomized(Block(lambda s, x: torch.relu(s.way(s.bn(s.before(x)))))).double().eval()
    theirs.before, theirs.way = operator.pos, given
    ours = fused(theirs, "fused with relu").eval()
    ours.before = waiting
    x = data(SHAPE, dtype=torch.float64)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ours(x)))
    thread.start()
    inside.wait(10)
    ours.before = given
    done.set()
    thread.join()
    torch.testing.assert_close(found[0], theirs(x), rtol=1e-9, atol=1e-9)


def scaled(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.factor != 1.0:
        x.mul_(s.factor)
    return torch.relu(y)


def scaled_in_function(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.factor != 1.0:
        functional.leaky_relu(x, 3.0, True)
    return torch.relu(y)


def scaled_in_module(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.factor != 1.0:
        s.act(x)
    return torch.relu(y)


def scaled_by_operator(s: Any, x: Any) -> Any:
    y, z = s.bn(x), x
    if s.factor != 1.0:
        z *= 2
    return torch.relu(y)


def scaled_residual(s: Any, x: Any) -> Any:
    r = s.conv(x)
    y = s.bn(x) + r
    if s.factor != 1.0:
        r.mul_(2)
    return torch.relu(y)


def scaled_result_of_layer(s: Any, x: Any) -> Any:
    r = s.conv(x)
    y = s.bn(r)
    if s.factor != 1.0:
        r.mul_(2)
    return torch.relu(y)


def scaled_out(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.factor != 1.0:
        torch.mul(x, 2, out=x)
    return torch.relu(y)


def scaled_data(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.factor != 1.0:
        x.data.mul_(2)
    return torch.relu(y)


def scaled_weight(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.factor != 1.0:
        s.scale.mul_(s.factor)
    return torch.relu(y)


CHANGING = [scaled, scaled_in_function, scaled_in_module, scaled_by_operator, scaled_residual, scaled_result_of_layer]
CHANGING += [scaled_out, scaled_data, scaled_weight]


@pytest.mark.parametrize("forward", CHANGING)
def test_what_changes_while_it_waits(forward: Any) -> None:
    """A norm is computed at once if its input might be modified, also where torch does not count modifications."""
    theirs = randomized(Block(forward)).double()
    theirs.factor, theirs.scale = 1.0, theirs.bn.weight
    ours = fused(theirs, "modifies a tensor by" if forward is not scaled_data else "not fused")
    ours.scale = ours.bn.weight
    for factor in (1.0, 2.0):
        theirs.factor = ours.factor = factor
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                x = data(SHAPE, dtype=torch.float64)
                torch.testing.assert_close(ours(x.clone()), theirs(x.clone()), rtol=1e-9, atol=1e-9)


def statistics_beside(s: Any, x: Any) -> Any:
    return torch.relu(s.bn(s.conv(x)) + s.mean.view(1, -1, 1, 1).expand(x.shape))


def test_statistics_under_another_name() -> None:
    """They are read after the norm has updated them."""
    theirs = randomized(Block(statistics_beside)).double()
    ours = copy.deepcopy(theirs)
    for model in (theirs, ours):
        model.mean = model.bn.running_mean
    report: list[Any] = []
    fastbn.torch.convert_batchnorm(ours, fuse=True, report=report)
    assert "not fused" in report[0].note
    check(theirs, ours)


class Static(nn.Module):  # type: ignore[misc]
    """A part whose forward has no self."""

    @staticmethod
    def forward(y: Any, x: Any = None) -> Any:
        return doubled(y) if x is None else y


def test_static_forwards() -> None:
    theirs = randomized(Block(lambda s, x: torch.relu(s.part(s.bn(x))), part=Static())).double()
    check(theirs, fused(theirs, "not fused"))


def test_defaults_that_are_no_tensors() -> None:
    """A default of the forward itself may be anything."""

    class Adding:
        def __radd__(self, y: Any) -> Any:
            return doubled(y)

        __add__ = __radd__

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Any, shift: Any = Adding()) -> Any:  # noqa: B008
            return torch.relu(shift + self.bn(x))

    theirs = randomized(Model()).double()
    check(theirs, fused(theirs, "not fused"))
    block = randomized(Block(lambda s, x: torch.relu(s.bn(s.conv(x)) + s.shift))).double().eval()
    block.shift = data(SHAPE, dtype=torch.float64)
    ours = fused(block, "fused with the addition and relu")
    ours.shift = Adding()
    x = data(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torch.relu(block.bn(block.conv(x)) * 2))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer", ["Sequential", "own"])
def test_a_model_that_is_exported(strict: bool, layer: str) -> None:
    """torch.export reads the arguments' names in the code of the model's own forward."""
    theirs: Any = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
    if layer == "own":
        theirs = Block(FUSED["module"][0])
    theirs = randomized(theirs).double().eval()
    ours, x = fused(theirs, "fused with relu"), data(SHAPE, dtype=torch.float64)
    exported = torch.export.export(ours, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), theirs(x))
