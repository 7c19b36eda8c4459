"""What must be so while a norm's result waits? Facts, which are noted once and checked at each call of the norm."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import _Layer
from .others import FORWARDS, has_hooks
from .source import Place

MISSING: Any = object()
is_alias = torch._C._is_alias_of
PLAIN = frozenset({Tensor, nn.Parameter, NoneType, bool, int, float, str})
PLAIN |= {torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format}
"""The types of values of which no operation runs code of a model."""

OURS: set[type] = {NoneType}
"""The types of the forwards that fastbn gives to modules; without one, the class's is used."""

Facts = frozenset[Any]
NONE: Facts = frozenset()
_KINDS = ("attribute", "item", "type", "calm", "order")


class Proof:
    """Where a norm's result may wait: after which calls, and what must be so then.

    `paths` has the calls that lead to the norm, the last first: places in code, and identities of modules; `calls`, the
    places by identities of code and offsets in it. `plain` says whether the arguments of the forward must be plain.
    `first`, if not None, must hold when the forward begins.
    """

    def __init__(
        self,
        norm: nn.Module,
        facts: Iterable[tuple[Any, ...]],
        paths: set[tuple[Any, ...]],
        calls: dict[Any, Place],
        plain: bool,
        first: Iterable[tuple[Any, ...]] = (),
    ) -> None:
        self.norm, self.paths, self.calls, self.plain = norm, paths, calls, plain
        self.first = Proof(norm, first, set(), {}, plain) if first else None
        kinds: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
        for kind, *fact in facts:
            kinds[kind].append(fact)
        self._attributes, self._items, self._types, self._calm, self._orders = (tuple(kinds[kind]) for kind in _KINDS)
        self._tensors = [value for *_, value in self._items if isinstance(value, Tensor)]

    def holds(self) -> bool:
        """Whether all is as it was when this was proven."""
        for of, name, value in self._attributes:
            if getattr(of, name, MISSING) is not value:
                return False
        for of, name, value in self._items:
            if of.get(name, MISSING) is not value:
                return False
        own = self.norm._buffers
        statistics = {id(tensor): tensor for tensor in own.values() if tensor is not None}
        if self._tensors and any(is_alias(one, other) for one in self._tensors for other in statistics.values()):
            return False
        for of, name in self._types:
            value = of.get(name)
            if type(value) not in PLAIN or (id(value) in statistics and of is not own):
                return False
        for (module,) in self._calm:
            if has_hooks(module) or type(module.__dict__.get("forward")) not in OURS:
                return False
        return all(tuple(map(id, of.values())) == ids for of, ids in self._orders)


class Notes:
    """Facts as they are found, by keys."""

    def __init__(self) -> None:
        self.table: dict[Any, tuple[Any, ...]] = {}

    def _note(self, kind: str, of: Any, name: Any, *more: Any) -> Facts:
        key = kind, id(of), name
        self.table.setdefault(key, (kind, of, *([name] if name is not None else []), *more))
        return frozenset({key})

    def attribute(self, of: Any, name: str) -> Facts:
        return self._note("attribute", of, name, getattr(of, name, MISSING))

    def item(self, of: Any, name: str) -> Facts:
        return self._note("item", of, name, of.get(name, MISSING))

    def type_of_item(self, of: Any, name: str) -> Facts:
        return self._note("type", of, name)

    def order(self, of: nn.Module) -> Facts:
        """That the modules in a module are the same, in the same order."""
        modules = of._modules
        ids = tuple(map(id, modules.values()))
        return self.item(vars(of), "_modules") | self._note("order", modules, None, ids)

    def ordinary(self, of: nn.Module) -> Facts | None:
        """That attributes of a module are found as torch finds them; None if they are not."""
        cls: Any = type(of)
        usual = (type(cls), cls.__getattribute__, cls.__getattr__)
        if usual != (type, object.__getattribute__, nn.Module.__getattr__):
            return None
        facts = self.attribute(cls, "__getattribute__") | self.attribute(cls, "__getattr__")
        return facts | self.attribute(of, "__class__")

    def calm(self, of: nn.Module) -> Facts | None:
        """That a call of a module is one of its class's forward, and no hook sees it; None if it is not."""
        cls, own = type(of), vars(of)
        ordinary = self.ordinary(of)
        if ordinary is None or has_hooks(of) or type(own.get("forward")) not in OURS:
            return None
        if (cls.__call__, cls._call_impl) != (nn.Module.__call__, nn.Module._call_impl):
            return None
        if of._compiled_call_impl is not None:
            return None
        facts = ordinary.union(*(self.attribute(cls, name) for name in ("__call__", "_call_impl", "forward")))
        return facts | self.attribute(of, "_compiled_call_impl") | self._note("calm", of, None)

    def layer(self, of: nn.Module) -> Facts | None:
        """That a layer runs torch's own code alone, on plain tensors; None if it does not."""
        facts = NONE
        for module in of.modules():
            cls, calm = type(module), self.calm(module)
            ours = isinstance(module, _Layer) and cls.forward in FORWARDS
            if calm is None or not (ours or _is_torchs(cls)):
                return None
            facts |= calm | self.order(module)
            for kind in ("_parameters", "_buffers"):
                tensors = vars(module)[kind]
                if not PLAIN.issuperset(map(type, tensors.values())):
                    return None
                facts |= self.item(vars(module), kind)
                facts = facts.union(*(self.type_of_item(tensors, name) for name in tensors))
        return facts


def _is_torchs(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.modules.") and getattr(nn, cls.__name__, None) is cls


# What is known of values ---------------------------------------------------------------------------------------------


class Value(NamedTuple):
    """What is known of a value."""

    waits: frozenset[Any] = frozenset()
    """The norms whose result it may be that waits."""
    plain: dict[Any, Facts] = {}  # noqa: RUF012  # never changed
    """The norms while whose result waits it is plain, or waits itself; and the facts on which this rests."""
    known: Any = MISSING
    """The object that it is."""
    facts: Facts = NONE
    """On which this rests."""
    items: bool = False
    """Whether it is a list or a tuple. What is in it is not known."""
    fresh: bool = False
    """Whether it is memory that no input of a norm has, so that it may be modified while the norm's result waits."""

    def resting(self, facts: Facts) -> Value:
        """What is known of it if some facts hold, too."""
        plain = {norm: before | facts for norm, before in self.plain.items()}
        return self._replace(plain=plain, facts=self.facts | facts)

    def freed(self, lost: Facts, free: Iterable[Any]) -> Value:
        """What is known of it without facts that are lost. It does not rest on those any more that are free."""
        plain = {norm: facts.difference(free) for norm, facts in self.plain.items() if facts.isdisjoint(lost)}
        known = self.known if self.facts.isdisjoint(lost) else MISSING
        return self._replace(plain=plain, known=known, facts=NONE)

    def same(self, other: Value) -> bool:
        """Whether as much is known."""
        return self.known is other.known and self._replace(known=None) == other._replace(known=None)


def mixed(values: list[Value]) -> dict[Any, Facts]:
    """The norms while which all values are plain."""
    if not values:
        return {}
    norms = set(values[0].plain).intersection(*(value.plain for value in values))
    return {norm: NONE.union(*(value.plain[norm] for value in values)) for norm in norms}


def joined(*values: Value) -> Value:
    """What is known of what is one of these values."""
    first = values[0]
    same = all(value.known is first.known for value in values)
    waits = first.waits.union(*(value.waits for value in values))
    facts = NONE.union(*(value.facts for value in values)) if same else NONE
    items = any(value.items for value in values)
    fresh = all(value.fresh for value in values)
    return Value(waits, mixed(list(values)), first.known if same else MISSING, facts, items, fresh)


Names = dict[str, Value]


def merged(*states: Names | None) -> Names | None:
    """What is known of names after one of several ways. None stands for a way that does not come to an end."""
    ends = [state for state in states if state is not None]
    names = dict.fromkeys(name for state in ends for name in state)
    return {name: joined(*(end[name] for end in ends if name in end)) for name in names} if ends else None
