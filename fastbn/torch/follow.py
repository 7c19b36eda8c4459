"""Can a norm's result, while it waits, reach code that could tell it from a tensor? A proof that it cannot.

The source of all functions through which the result goes is followed, from the forward of a module on: which values may
wait, which are plain tensors or numbers, and which are known modules and functions. What waits may go into additions
and activations, may be used as a tensor is, and may be passed to modules and functions that are followed, too. While it
waits, nothing else runs but torch's own functions and layers on plain values. All else refuses the norm. What is looked
up on the way (attributes, globals, hooks) is noted as facts, which are checked again at each call of the norm.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from .layers import _Layer
from .others import ADDITIONS, FUNCTIONS, is_in_place
from .proof import MISSING, NONE, PLAIN, Facts, Names, Notes, Proof, Value, joined, mixed
from .source import Function, Place, calls_of, contains, function_of

ABSENT: Any = object()
_CALLABLE = (FunctionType, BuiltinFunctionType, MethodDescriptorType)
_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_BUILTINS = {len, int, float, bool, str, abs, min, max, round, range, isinstance}
_BUILTINS |= {one for one in vars(builtins).values() if isinstance(one, type) and issubclass(one, Exception)}
_CREATING = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.tensor}
ODD = {"numpy", "tolist", "grad_fn", "backward", "data", "storage", "untyped_storage", "data_ptr"}
"""What tensors have that is not plain, runs hooks, or lets others modify them in silence."""
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, _Layer)
"""Layers whose results are memory of their own."""


@functools.cache
def _harmless() -> frozenset[Any]:
    """Functions of Python and torch that run nothing but their own code, if their arguments are plain."""
    by_place = torch.overrides.get_overridable_functions().values()
    theirs = {f for functions in by_place for f in functions if isinstance(f, _CALLABLE)} - {Tensor.backward}
    theirs |= _CREATING | {torch._C._log_api_usage_once}
    return frozenset(theirs | _BUILTINS | {torch.jit.is_scripting, torch.jit.is_tracing, torch.compiler.is_compiling})


class Frame:
    """A function that is followed."""

    def __init__(self, function: FunctionType, names: Names) -> None:
        self.function, self.code = function, function.__code__
        self.names: Names | None = names
        self.results: list[Value] = []
        self.rests: Facts = NONE
        """The facts without which there might be other results."""
        self.left: list[Names | None] = []
        """What is known of names where a loop is left, or begun again, within."""

    def set(self, name: str, value: Value) -> None:
        if self.names is not None:
            self.names[name] = value


class Reader(Notes):
    """Follows the source from the forward of a module on."""

    def __init__(self, norms: list[nn.Module], plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.whole: dict[Any, Facts] = dict.fromkeys(norms, NONE)
        self.facts: dict[Any, set[Any]] = {norm: set() for norm in norms}
        self.paths: dict[Any, set[tuple[Any, ...]]] = {norm: set() for norm in norms}
        self.reasons: dict[Any, str] = {}
        self.skipped: list[str] = []
        """What could not be followed, in words."""
        self.frames: list[Frame] = []
        self.held: list[Value] = []
        """Values that are kept until the expression in which they are is over."""
        self.rests: list[Facts] = []
        """That the functions and modules that are followed now are what is called."""
        self.path: list[Any] = []
        """The calls in which the function that is followed is: places, and identities of modules."""
        self.calls: dict[Any, Place] = {}
        self.first: Facts | None = None
        """On which it rests what was read before any code that is not followed; None if there was none yet."""

    def start(self, owner: nn.Module) -> None:
        """Follows the forward of a module."""
        given = Value(plain=self.whole) if self.plain else Value()
        forward = forward_of(owner)
        self.rests.append(self.attribute(type(owner), "forward"))
        if forward is nn.Sequential.forward:
            self.sequence(owner, given)
        elif forward is not None:
            self.function(forward, [Value(known=owner)], {}, given)

    def proof(self, norm: nn.Module) -> Proof:
        facts = [self.table[key] for key in self.facts[norm] if key in self.table]
        first = [self.table[key] for key in self.first or () if key in self.table]
        return Proof(norm, facts, self.paths[norm], self.calls, self.plain, first)

    # What waits

    def live(self) -> set[Any]:
        """The norms whose results may wait now."""
        found: set[Any] = set()
        for frame in self.frames:
            found.update(*(value.waits for value in (frame.names or {}).values()))
        return found.union(*(value.waits for value in self.held))

    def refuse(self, norms: Iterable[Any], why: str) -> None:
        where = self.frames[-1].code.co_qualname.rpartition("<locals>.")[2] if self.frames else "nn.Sequential"
        for norm in norms:
            self.reasons.setdefault(norm, f"{where} {why}")

    def use(self, facts: Facts) -> None:
        """What comes after this rests on facts."""
        for norm in self.live():
            self.facts[norm] |= facts

    def touch(self, values: list[Value], what: str) -> Value:
        """The result of an operation that runs no code of the model's if the values are plain."""
        for norm in self.live():
            for value in values:
                if norm not in value.plain:
                    self.refuse({norm}, f"uses {what}, which may run other code while the result waits")
                else:
                    self.facts[norm] |= value.plain[norm]
        return Value(plain=mixed(values) if values else self.whole)

    def modify(self, value: Value | None, what: str) -> None:
        """Refuses what waits if something is modified that a norm's input might be."""
        if value is None or not value.fresh:
            self.refuse(self.live(), f"modifies a tensor by {what} while the result waits")

    def fix(self) -> None:
        """None of the values that there are may be modified from now on, while a result waits."""
        self.held = [value._replace(fresh=False) for value in self.held]
        for frame in self.frames:
            for name, value in (frame.names or {}).items():
                frame.set(name, value._replace(fresh=False))

    def unknown(self, what: str, values: Iterable[Value] = ()) -> Value:
        """The result of code that is not followed: it may do anything."""
        for value in values:
            self.refuse(value.waits, f"gives the result to {what}, which could tell that it waits")
        self.refuse(self.live(), f"uses {what} while the result waits")
        self.forget()
        return Value()

    def forget(self) -> None:
        """Any attribute or global may be another now. What rests on facts about them is not known any more.

        The first time, it is known if the facts hold when the forward that is followed begins.
        """
        if self.first is None:
            names = [value for frame in self.frames for value in (frame.names or {}).values()]
            self.first = NONE.union(*(value.facts.union(*value.plain.values()) for value in (*self.held, *names)))
            lost = NONE
        else:
            lost = frozenset(self.table)
        self.held = [value.freed(lost, self.table) for value in self.held]
        for frame in self.frames:
            for name, value in (frame.names or {}).items():
                frame.set(name, value.freed(lost, self.table))

    # Calls

    def call(self, callee: Value, args: list[Value], named: Names, what: str) -> Value:
        known, facts, values = callee.known, callee.facts, [*args, *named.values()]
        if type(known) is MethodType:
            args, known = [Value(known=known.__self__, facts=facts), *args], known.__func__
        if issubclass(type(known), nn.Module):
            return self.module(known, facts, args, named, what)
        if known is getattr and len(args) > 1 and args[1].known is not MISSING and not named:
            return self.getattr(args, facts, what)
        if isinstance(known, _CALLABLE) or known in _BUILTINS:
            if type(known) is FunctionType:
                facts |= self.attribute(known, "__code__")
            if known in FUNCTIONS or known in ADDITIONS:
                self.use(facts)
                return self.fused(known, args, named, what).resting(facts)
            if known in _harmless() and not any(value.waits for value in values):
                self.use(facts)
                if known is isinstance:
                    self.use(NONE.union(*(value.facts for value in values)))
                    values = [value for value in values if not _is_asked(value.known)]
                fresh = known in _CREATING or known in _BUILTINS - {max, min}  # which return an argument
                if self.modifies(known, args, named):
                    self.modify(args[0] if args and "out" not in named else None, what)
                return self.touch(values, what).resting(facts)._replace(fresh=fresh)
            if type(known) is FunctionType and known not in _harmless():
                self.use(facts)
                self.rests.append(facts)
                y = self.function(known, args, named).resting(facts)
                self.rests.pop()
                return y
        return self.unknown(what, values)

    def getattr(self, args: list[Value], facts: Facts, what: str) -> Value:
        """The attribute of a known object that the function getattr looks up, or its default."""
        found = self.found(args[0], str(args[1].known))
        if found is None or (found.known is ABSENT and len(args) < 3):
            return self.unknown(what, args)
        found = found.resting(facts)
        return found if found.known is not ABSENT else args[2].resting(found.facts)

    def fused(self, function: Any, args: list[Value], named: Names, what: str) -> Value:
        """An activation of what waits, or the sum of it and something plain, which may wait in turn."""
        last = 2 if function in ADDITIONS else 1
        for value in [*args[last:], *named.values()]:
            self.refuse(value.waits, f"gives the result to {what}, not as what it is computed of")
        if self.modifies(function, args, named):
            self.modify(args[0] if args and "out" not in named else None, what)
        y = self.touch([*args, *named.values()], what)._replace(fresh=bool(args) and args[0].fresh)
        return self.sum(y, args[:2]) if last == 2 else y

    def sum(self, y: Value, values: list[Value]) -> Value:
        """A sum, which may wait, and then needs its terms as they are."""
        waits = Value().waits.union(*(value.waits for value in values))
        if waits:
            self.fix()
        return y._replace(waits=waits)

    def modifies(self, function: Any, args: list[Value], named: Names) -> bool:
        """Whether a function of torch or Python works in place."""
        code, name = getattr(function, "__code__", None), getattr(function, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or is_in_place(function) or "out" in named:
            return True
        places = code.co_varnames[: code.co_argcount] if code is not None else ()
        if "inplace" not in places:
            return False
        where = places.index("inplace")
        given = args[where] if len(args) > where else named.get("inplace")
        if given is not None and given.known is False:
            self.use(given.facts)
        return given is not None and given.known is not False

    def method(self, of: Value, name: str, args: list[Value], named: Names, what: str) -> Value:
        """A call of a method of something that waits, or is not known."""
        function, values = getattr(Tensor, name, None), [of, *args, *named.values()]
        if isinstance(function, _CALLABLE) and (function in FUNCTIONS or function in ADDITIONS):
            return self.fused(function, [of, *args], named, what)
        if any(value.waits for value in values[1:]) or name in ODD or not is_public(name):
            return self.unknown(what, values)
        if not all(norm in value.plain for value in values for norm in self.whole):
            self.forget()
        if self.modifies(function, values, named):
            self.modify(of, what)
        fresh = name.startswith("new_") or name == "clone" or (name.endswith("_") and of.fresh)
        return self.touch(values, what)._replace(fresh=fresh)

    def module(self, of: nn.Module, facts: Facts, args: list[Value], named: Names, what: str) -> Value:
        if of in self.whole and of not in self.reasons:
            y = self.norm(of, args, named)
            if y is not None:
                return y
        calm = self.calm(of)
        if calm is None:
            return self.unknown(what, [*args, *named.values()])
        facts |= calm
        self.use(facts)
        self.path.append(id(of))
        self.rests.append(facts)
        forward = forward_of(of)
        if forward is nn.Sequential.forward and len(args) == 1 and not named:
            y = self.sequence(of, args[0])
        elif (own := self.layer(of)) is not None and not any(value.waits for value in (*args, *named.values())):
            for module in of.modules():
                if vars(module).get("inplace", False) is not False:
                    self.modify(args[0] if args else None, what)
                own |= self.item(vars(module), "inplace")
            self.use(own)
            y = self.touch([*args, *named.values()], what).resting(own)
            y = y._replace(fresh=isinstance(of, _FRESH) or (len(args) == 1 and args[0].fresh))
        elif forward is not None and not isinstance(of, _Layer):
            y = self.function(forward, [Value(known=of), *args], named)
        else:
            y = self.unknown(what, [*args, *named.values()])
        self.path.pop()
        self.rests.pop()
        return y.resting(facts)

    def sequence(self, of: nn.Module, y: Value) -> Value:
        """The modules of a Sequential one after the other."""
        if type(of).__iter__ is not nn.Sequential.__iter__:
            return self.unknown(type(of).__name__, [y])
        facts = self.attribute(type(of), "__iter__") | self.order(of)
        self.rests.append(facts)
        self.held.append(y)
        for child in of._modules.values():
            self.held[-1] = y = self.call(Value(known=child, facts=facts), [y], {}, type(child).__name__)
        self.use(facts)
        self.held.pop()
        self.rests.pop()
        return y.resting(facts)

    def norm(self, of: nn.Module, args: list[Value], named: Names) -> Value | None:
        """The result of a norm, which waits from now on; None if it must not."""
        own, given = self.layer(of), ("given", of)
        path = (id(of), *reversed(self.path))
        names = [value for frame in self.frames for value in (frame.names or {}).values()]
        before = any(of in value.waits or given in value.plain.get(of, ()) for value in (*names, *self.held))
        if before or len(args) != 1 or named or args[0].waits or own is None or None in path:
            self.refuse({of}, f"calls {type(of).__name__} more than once, or otherwise than with its input alone")
            return None
        self.paths[of].add(path)
        self.facts[of].update(*self.rests)
        self.use(own)
        self.fix()
        y = self.touch(args, type(of).__name__).resting(own)
        return y._replace(waits=frozenset({of}), plain=y.plain | {of: frozenset({given})}, fresh=True)

    def function(self, function: FunctionType, args: list[Value], named: Names, given: Value | None = None) -> Value:
        """The results of a function. If values of all other arguments are given, it is the first that is followed."""
        code, node = function.__code__, function_of(function)
        name = code.co_qualname.rpartition("<locals>.")[2]
        names = None if node is None else self.bound(function, node.args, args, named, given)
        body: list[Any] = [] if node is None else node.body if isinstance(node.body, list) else [node.body]
        if node is None or code.co_flags & _GENERATORS or contains(body, ast.Global, ast.Nonlocal):
            self.skipped.append(name if node is not None else f"{name}, whose source is not at hand")
            return self.unknown(self.skipped[-1], [*args, *named.values()])
        if names is None or any(frame.code is code for frame in self.frames):
            return self.unknown(name, [*args, *named.values()])
        frame = Frame(function, names)
        self.calls |= calls_of(code)
        self.frames.append(frame)
        self.kept(frame, names)
        self.body(node, frame)
        self.frames.pop()
        return joined(*frame.results).resting(frame.rests)

    def bound(
        self, function: FunctionType, wanted: ast.arguments, args: list[Value], named: Names, given: Value | None
    ) -> Names | None:
        """The names of a function's arguments; None if they do not fit."""
        places = [one.arg for one in (*wanted.posonlyargs, *wanted.args)]
        names = dict(zip(places, args, strict=False)) | named
        alone = [one.arg for one in wanted.kwonlyargs]
        if len(args) > len(places) or not named.keys() <= {*places[len(args) :], *alone}:
            return None
        defaults = function.__defaults__ or ()
        for name, default in zip(places[len(places) - len(defaults) :], defaults, strict=True):
            if name not in names:
                names[name] = self.object(default, self.attribute(function, "__defaults__"))
        for name in alone:
            if name not in names and function.__kwdefaults__ and name in function.__kwdefaults__:
                facts = self.attribute(function, "__kwdefaults__")
                facts |= self.item(function.__kwdefaults__, name)
                names[name] = self.object(function.__kwdefaults__[name], facts)
        for rest in (wanted.vararg, wanted.kwarg):
            if rest is not None:
                names[rest.arg] = Value()
        if given is not None:
            for name in {*places, *alone} - {*places[: len(args)]}:
                names[name] = joined(given, names.get(name, given))
        return names if names.keys() >= {*places, *alone} else None

    def kept(self, frame: Frame, names: Iterable[str]) -> None:
        """Refuses what waits under names that other functions see."""
        for name in set(frame.code.co_cellvars).intersection(names):
            self.refuse((frame.names or {})[name].waits, f"has a function within that sees {name}, which may wait")

    def body(self, node: Function, frame: Frame) -> None:
        """Follows what is in a function: syntax.py."""
        raise NotImplementedError

    # What names and attributes stand for

    def object(self, found: Any, facts: Facts, weaker: Facts | None = None) -> Value:
        """What is known of an object. For its type alone, the weaker facts are enough."""
        plain = {}
        if type(found) in PLAIN:
            plain = dict.fromkeys(self.whole, facts if weaker is None or type(found) is Tensor else weaker)
            if isinstance(found, Tensor):  # a norm's statistics under another name change with its call
                plain = {norm: facts for norm in plain if not _shares(found, norm)}
        if type(found) in (NoneType, bool, MethodType, ModuleType, *_CALLABLE) or issubclass(
            type(found), (nn.Module, type)
        ):
            return Value(plain=plain, known=found, facts=facts)
        return Value(plain=plain)

    def of_mapping(self, of: Any, name: str, facts: Facts) -> Value:
        return self.object(of[name], facts | self.item(of, name), facts | self.type_of_item(of, name))

    def found(self, value: Value, name: str) -> Value | None:
        """An attribute of a known object; None if it cannot be known. To look it up runs no code of the model's."""
        of, facts = value.known, value.facts
        if issubclass(type(of), nn.Module):
            return self.of_module(of, name, facts)
        if type(of) is ModuleType and name in vars(of):
            return self.of_mapping(vars(of), name, facts)
        if isinstance(of, (FunctionType, type)) and name in ("__module__", "__name__"):
            return Value(plain=self.whole)
        if isinstance(of, FunctionType) and name == "__class__":
            return Value(known=FunctionType)
        return None

    def of_module(self, of: nn.Module, name: str, facts: Facts) -> Value | None:
        own, cls, ordinary = vars(of), type(of), self.ordinary(of)
        if ordinary is None:
            return None
        if of in self.live():
            self.refuse({of}, f"reads {name} of {type(of).__name__} while the result waits")
        of_class = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)
        facts |= ordinary
        if hasattr(type(of_class), "__get__") and type(of_class) not in (FunctionType, staticmethod):
            return None
        facts |= self.attribute(cls, name)
        if name == "training":
            return Value(plain=self.whole).resting(facts | self.type_of_item(own, name))
        if name in own:
            return self.of_mapping(own, name, facts)
        facts |= self.item(own, name)
        if type(of_class) is FunctionType:
            return Value(known=MethodType(of_class, of), facts=facts)
        if of_class is not MISSING:
            return self.object(getattr(cls, name), facts)
        for kind in ("_parameters", "_buffers", "_modules"):
            facts |= self.item(own, kind)
            if name in own[kind]:
                return self.of_mapping(own[kind], name, facts)
            facts |= self.item(own[kind], name)
        return Value(known=ABSENT, facts=facts)


def forward_of(module: nn.Module) -> FunctionType | None:
    """The forward of a module's class, if it is a function."""
    forward = inspect.getattr_static(type(module), "forward", None)
    return forward if type(forward) is FunctionType else None


def _is_asked(known: Any) -> bool:
    """Whether isinstance runs no code of the model's to look at this object, or at this class."""
    return isinstance(known, nn.Module) or type(known) is type or (isinstance(known, type) and known in PLAIN)


def _shares(tensor: Tensor, norm: nn.Module) -> bool:
    """Whether a tensor may have memory of a norm's statistics."""
    memory = tensor.untyped_storage().data_ptr()
    return any(other is not None and other.untyped_storage().data_ptr() == memory for other in norm._buffers.values())


def is_public(name: str) -> bool:
    """Whether this is an attribute of tensors that what waits passes on."""
    return not name.startswith("_") and hasattr(Tensor, name)
