"""Is it sound what convert_batchnorm(fuse=True) proves? What waits reaches nothing that could tell it from a tensor."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
from torch_cases import as_found, data, randomized, torch
from torch_fusing import FUSED, SHAPE, Block, Doubling, check, doubled, fused, given

__all__ = ["as_found"]
nn = torch.nn
functional = torch.nn.functional

# What is exchanged after the conversion ------------------------------------------------------------------------------


class Given(nn.Module):  # type: ignore[misc]
    """A part whose method is exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.list, self.rest = nn.ModuleList([nn.Identity()]), nn.Sequential()
        self.all = nn.ModuleList()

    def forward(self, y: Any) -> Any:
        return self.way(y)

    def way(self, y: Any) -> Any:
        return y


helper = given
WAYS = {"way": given}


def by_attribute(s: Any, x: Any) -> Any:
    return torch.relu(s.way(s.bn(x)))


def by_local(s: Any, x: Any) -> Any:
    way = s.way
    y = s.bn(x)
    return torch.relu(way(y))


def by_global(s: Any, x: Any) -> Any:
    return torch.relu(helper(s.bn(x)))


def by_method(s: Any, x: Any) -> Any:
    return torch.relu(s.part(s.bn(x)))


def by_default(s: Any, x: Any, way: Any = given) -> Any:
    return torch.relu(way(s.bn(x)))


def by_keyword(s: Any, x: Any, *, way: Any = given) -> Any:
    return torch.relu(way(s.bn(x)))


def by_flag(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.flag:
        y = doubled(y)
    return torch.relu(y)


def by_none(s: Any, x: Any) -> Any:
    y = s.bn(x)
    if s.extra is not None:
        y = s.extra(y)
    return torch.relu(y)


def by_chosen(s: Any, x: Any) -> Any:
    way = doubled if s.flag else given
    return torch.relu(way(s.bn(x)))


def by_chosen_before(s: Any, x: Any) -> Any:
    way = given
    if s.flag:
        way = doubled
    return torch.relu(way(s.bn(x)))


def by_chosen_again(s: Any, x: Any) -> Any:
    way = doubled
    if not s.flag:
        way = given
    return torch.relu(way(s.bn(x)))


def chosen(s: Any) -> Any:
    if s.flag:
        return doubled
    return given


def by_result(s: Any, x: Any) -> Any:
    return torch.relu(chosen(s)(s.bn(x)))


def by_and(s: Any, x: Any) -> Any:
    way = given
    if s.flag and (way := doubled) and s.extra:
        x = x * 3
    return torch.relu(way(s.bn(x)))


def by_loop_over_modules(s: Any, x: Any) -> Any:
    way = doubled
    for _ in s.part.list:
        way = given
    return torch.relu(way(s.bn(x)))


def by_modules(s: Any, x: Any) -> Any:
    y = s.bn(x)
    for part in s.part.list:
        y = part(y)
    return torch.relu(y)


def by_modules_with_norms(s: Any, x: Any) -> Any:
    for part in s.part.all:
        x = part(x)
    return torch.relu(x)


def by_container(s: Any, x: Any) -> Any:
    return torch.relu(s.part.rest(s.bn(x)))


def by_index(s: Any, x: Any) -> Any:
    return torch.relu(s.part.list[0](s.bn(x)))


def exchange_in_class(ours: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Given, "way", lambda self, y: doubled(y))


def exchange_in_instance(ours: Any, monkeypatch: Any) -> None:
    ours.part.way = doubled


def exchange_code(ours: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(given, "__code__", doubled.__code__)


def exchange_globals(ours: Any, monkeypatch: Any) -> None:
    """The same code in another function."""
    ours.run = types.FunctionType(ours.run.__code__, globals() | {"helper": doubled})


class Property(Given):
    @property
    def way(self) -> Any:
        return doubled


def set_class(ours: Any, monkeypatch: Any) -> None:
    ours.part.__class__ = Property


def set_modules(ours: Any, monkeypatch: Any) -> None:
    """Another dict of modules."""
    ours._modules = dict(ours._modules) | {"part": Doubling()}


def hide(ours: Any, monkeypatch: Any) -> None:
    """An instance attribute is found before a module."""
    vars(ours)["part"] = Doubling()


def call_otherwise(ours: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Given, "__call__", lambda self, y: doubled(y), raising=False)


def odd_attribute(self: Any, name: str) -> Any:
    return doubled if name == "way" else nn.Module.__getattribute__(self, name)


EXCHANGES = {
    "attribute": (by_attribute, lambda ours, patch: setattr(ours, "way", doubled)),
    "attribute kept in a name": (by_local, lambda ours, patch: setattr(ours, "way", doubled)),
    "module in an attribute": (by_attribute, lambda ours, patch: setattr(ours, "way", Doubling())),
    "code": (by_attribute, exchange_code),
    "global": (by_global, lambda ours, patch: patch.setitem(globals(), "helper", doubled)),
    "global function in other globals": (by_global, exchange_globals),
    "method of a class": (by_method, exchange_in_class),
    "method of an instance": (by_method, exchange_in_instance),
    "forward of a class": (by_method, lambda ours, patch: patch.setattr(Given, "forward", lambda s, y: doubled(y))),
    "forward of an instance": (by_method, lambda ours, patch: setattr(ours.part, "forward", doubled)),
    "module": (by_method, lambda ours, patch: setattr(ours, "part", Doubling())),
    "class of a module": (by_method, set_class),
    "modules": (by_method, set_modules),
    "hidden module": (by_method, hide),
    "call": (by_method, call_otherwise),
    "attributes of a class": (
        by_method,
        lambda ours, patch: patch.setattr(Given, "__getattribute__", odd_attribute, raising=False),
    ),
    "default": (by_default, lambda ours, patch: patch.setattr(by_default, "__defaults__", (doubled,))),
    "keyword default": (by_keyword, lambda ours, patch: patch.setitem(by_keyword.__kwdefaults__, "way", doubled)),
    "keyword defaults": (by_keyword, lambda ours, patch: patch.setattr(by_keyword, "__kwdefaults__", {"way": doubled})),
    "flag before": (by_chosen_before, lambda ours, patch: setattr(ours, "flag", True)),
    "flag again": (by_chosen_again, lambda ours, patch: setattr(ours, "flag", True)),
    "flag and result": (by_result, lambda ours, patch: setattr(ours, "flag", True)),
    "no modules": (by_loop_over_modules, lambda ours, patch: setattr(ours.part, "list", nn.ModuleList())),
    "more modules": (by_modules, lambda ours, patch: ours.part.list.append(Doubling())),
    "no more modules": (by_modules, lambda ours, patch: ours.part.list._modules.update({"0": Doubling()})),
    "modules after a norm": (by_modules_with_norms, lambda ours, patch: ours.part.all.append(Doubling())),
    "in an empty container": (by_container, lambda ours, patch: ours.part.rest.append(Doubling())),
    "module of an index": (by_index, lambda ours, patch: ours.part.list.__setitem__(0, Doubling())),
    "flag": (by_flag, lambda ours, patch: setattr(ours, "flag", True)),
    "flag and choice": (by_chosen, lambda ours, patch: setattr(ours, "flag", True)),
    "none": (by_none, lambda ours, patch: setattr(ours, "extra", doubled)),
    "function of torch": (
        FUSED["module"][0],
        lambda ours, patch: patch.setattr(functional, "relu", lambda y, inplace=False: torch.relu_(doubled(y))),
    ),
}
"""Forwards, and what makes them double a tensor later."""


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("which", EXCHANGES)
def test_what_is_exchanged(which: str, called_before: bool, monkeypatch: Any) -> None:
    """A tensor is given to what was put in place later, before the first call and after it."""
    forward, exchange = EXCHANGES[which]
    model = randomized(Block(forward, part=Given())).double().eval()
    if forward is by_modules_with_norms:
        model.part.all.append(model._modules.pop("bn"))
    model.way, model.flag, model.extra = given, False, None
    ours = fused(model, "fused with relu").eval()
    x = data(SHAPE, dtype=torch.float64)
    norm = model.part.all[0] if forward is by_modules_with_norms else model.bn
    wanted = torch.relu(norm(model.conv(x) if which == "function of torch" else x))
    if called_before:
        torch.testing.assert_close(ours(x), wanted, rtol=1e-9, atol=1e-9)
    exchange(ours, monkeypatch)
    torch.testing.assert_close(ours(x), wanted * 2, rtol=1e-9, atol=1e-9)


# What cannot be known when the model is converted ---------------------------------------------------------------------


def made(way: Any) -> Any:
    def forward(s: Any, x: Any) -> Any:
        return torch.relu(way[0](s.bn(x)))

    return forward


def by_list(s: Any, x: Any) -> Any:
    return torch.relu(s.ways[0](s.bn(x)))


def by_dict(s: Any, x: Any) -> Any:
    return torch.relu(WAYS["way"](s.bn(x)))


def by_getattr(s: Any, x: Any) -> Any:
    name = s.names[0]
    return torch.relu(getattr(s, name)(s.bn(x)))


def by_swapping(s: Any, x: Any) -> Any:
    y = s.bn(x)
    s.way = doubled
    return torch.relu(s.way(y))


def by_swapping_back(s: Any, x: Any) -> Any:
    s.way = doubled
    way = s.way
    s.way = given
    return torch.relu(way(s.bn(x)))


def by_walrus(s: Any, x: Any) -> Any:
    way = given
    [(way := one) for one in s.ways]
    return torch.relu(way(s.bn(x)))


def by_import(s: Any, x: Any) -> Any:
    way = given
    from operator import neg as way  # type: ignore[assignment]  # noqa: F811

    return torch.relu(way(way(s.bn(x))))


def by_loop(s: Any, x: Any) -> Any:
    way = given
    for _ in range(2):
        x, way = way(x), doubled
    return torch.relu(way(s.bn(x)))


def by_break(s: Any, x: Any) -> Any:
    way = given
    while True:
        if s.flag:
            break
        way = doubled
        if x.shape[0] > 0:
            break
        way = given
    else:
        way = given
    return torch.relu(way(s.bn(x)))


def by_two_ways(s: Any, x: Any) -> Any:
    way = given
    if x.shape[0] > 0:
        way = doubled
    return torch.relu(way(s.bn(x)))


def by_match(s: Any, x: Any) -> Any:
    way = given
    match {"way": doubled}:
        case {"way": way}:
            pass
    return torch.relu(way(s.bn(x)))


def by_star(s: Any, x: Any) -> Any:
    return torch.relu(s.way(*(s.bn(x),)))


def by_format(s: Any, x: Any) -> Any:
    y = s.bn(x)
    return torch.relu(y) * len(f"{1:{len(type(y).__name__)}}")


def by_choice(s: Any, x: Any) -> Any:
    way = given
    _ = (way := doubled) if s.flag else None
    s.flag = not s.flag
    return torch.relu(way(s.bn(x)))


def by_exit(s: Any, x: Any) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(TypeError))
        x = torch.Tensor.mul(s.bn(x), 2)
    return torch.relu(x)


def by_cause(s: Any, x: Any) -> Any:
    y = s.bn(x)
    try:
        torch.Tensor.mul(y, 1)
    except TypeError:
        return torch.relu(y)
    finally:
        y = y * 2
    return torch.relu(y)


quiet = contextlib.suppress
UNKNOWN = [by_list, by_dict, by_getattr, by_swapping, by_swapping_back, by_walrus, by_import, by_loop, by_break]
UNKNOWN += [by_choice, by_and, by_format, by_two_ways, by_match, by_star, by_exit, by_cause, made([given])]


@pytest.mark.parametrize("forward", UNKNOWN)
def test_what_cannot_be_known(forward: Any, monkeypatch: Any) -> None:
    """It is not fused, and right when it is exchanged."""
    theirs = randomized(Block(forward)).double()
    theirs.ways, theirs.names, theirs.way, theirs.other, theirs.flag = [given], ["way"], given, doubled, False
    ours = fused(theirs, "not fused")
    check(theirs, ours)
    for model in (theirs, ours):
        model.ways[0], model.names[0] = doubled, "other"
    monkeypatch.setitem(WAYS, "way", doubled)
    check(theirs, ours)
    assert not any("forward" in vars(module) for module in ours.modules())
