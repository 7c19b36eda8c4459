"""How does one call of the kernels do a norm's work, and that of the addition and the activation after it?

In a forward that convert_batchnorm(fuse=True) has prepared, a norm returns a `Pending` in the place of a tensor. The
model's own code goes on with it, whatever that code is. An addition of a tensor of the same shape, dtype and layout is
noted. An activation computes everything in one call, and its result is a tensor. Any other use of a `Pending` computes
the tensor that the norm would have returned, so that results are always those of the model's code. Code that could tell
a `Pending` from a tensor otherwise than by its use does not get one; telling.py finds such code.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import Activation
from .others import FORWARDS, has_hooks, has_hooks_for_all
from .telling import applies, asks, asks_for_class, caught, innocent, telling
from .watchers import watched

_is_compiling = torch.compiler.is_compiling
_has_torch_function = torch.overrides.has_torch_function

# What may be fused ---------------------------------------------------------------------------------------------------

_IN_PLACE = {"inplace": False}
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    functional.relu: ("relu", _IN_PLACE),
    torch.relu: ("relu", {}),
    Tensor.relu: ("relu", {}),
    torch.relu_: ("relu", {"inplace": True}),
    Tensor.relu_: ("relu", {"inplace": True}),
    functional.relu6: ("relu6", _IN_PLACE),
    functional.hardtanh: ("hardtanh", {"min_val": -1.0, "max_val": 1.0} | _IN_PLACE),
    functional.leaky_relu: ("leaky_relu", {"negative_slope": 0.01} | _IN_PLACE),
    functional.silu: ("silu", _IN_PLACE),
    functional.hardswish: ("hardswish", _IN_PLACE),
    functional.sigmoid: ("sigmoid", {}),
    torch.sigmoid: ("sigmoid", {}),
    Tensor.sigmoid: ("sigmoid", {}),
    torch.sigmoid_: ("sigmoid", {"inplace": True}),
    Tensor.sigmoid_: ("sigmoid", {"inplace": True}),
}
"""Functions that are activations, by fastbn's names, with the parameters that follow their input."""

_ADDITIONS = {operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_}
_ADDITIONS_IN_PLACE = {operator.iadd, Tensor.add_}


def activation_called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Activation, bool] | None:
    """The activation that a call computes, and whether it does so in place; None if it is not one to fuse."""
    if function not in _FUNCTIONS:
        return None
    name, parameters = _FUNCTIONS[function]
    given = parameters | dict(zip(parameters, args[1:], strict=False)) | kwargs
    if len(args) - 1 > len(parameters) or given.keys() != parameters.keys():
        return None
    in_place = bool(given.get("inplace", False))
    if name == "hardtanh":
        return ("relu6", in_place) if (given["min_val"], given["max_val"]) == (0, 6) else None
    if name == "leaky_relu":
        slope = given["negative_slope"]
        return (("leaky_relu", slope), in_place) if isinstance(slope, float) and abs(slope) < torch.inf else None
    return name, in_place


def is_addition(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is the sum of two things."""
    return function in _ADDITIONS and len(args) == 2 and not kwargs


def is_in_place(function: Any) -> bool:
    """Whether an addition writes into its first argument."""
    return function in _ADDITIONS_IN_PLACE


class Site:
    """A place in a model at which the result of a norm may wait for an addition, for an activation, or for both."""

    def __init__(self, adds: bool, activates: bool) -> None:
        self.adds = adds
        self.activates = activates


# What waits ----------------------------------------------------------------------------------------------------------


def _version(tensor: Tensor) -> int:
    """How often a tensor was modified in place; inference tensors have no count."""
    return 0 if tensor.is_inference() else tensor._version


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _counted(tensors: Any) -> list[Any]:
    return [None if tensor is None else (tensor.requires_grad, _version(tensor)) for tensor in tensors]


def state_of(norm: Any, statistics: bool = True) -> tuple[Any, ...]:
    """Whatever of a norm its result depends on, but for its input, as it is now; the running statistics at the end."""
    own, parameters, buffers = vars(norm), norm._parameters.values(), norm._buffers.values()
    named = [own.get(name) for name in ("eps", "momentum", "track_running_stats", "num_features", "activation")]
    changing = _counted(buffers) if statistics else ()
    return norm.training, *named, *parameters, *buffers, *_counted(parameters), *changing


def same_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether nothing has changed."""
    return len(before) == len(after) and all(a is b or _same(a, b) for a, b in zip(before, after, strict=True))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


_OWN = ("_state", "_norm", "_site", "_x", "_made", "_residual", "_versions", "_modes", "_value", "_spent")
_set = object.__setattr__
"""Sets what is a `Pending`'s own. All other attributes are its tensor's."""


class Pending:
    """The result of a norm that has not been computed yet.

    `made` has those of one call of a fused forward that still wait. The versions of the input and the residual, and
    whether gradients are recorded, are kept from the call of the norm. Once an addition or activation was fused, this
    is spent: a further use computes the norm again, without another update of the running statistics.
    """

    __slots__ = (*_OWN, "__weakref__")
    _state: tuple[Any, ...]
    _norm: Any
    _site: Site
    _x: Tensor
    _made: dict[int, Pending]
    _residual: Tensor | None
    _versions: tuple[int, int]
    _modes: tuple[bool, bool]
    _value: Tensor | None
    _spent: bool

    def __init__(
        self, norm: Any, site: Site, x: Tensor, made: dict[int, Pending], residual: Tensor | None = None
    ) -> None:
        _set(self, "_state", state_of(norm))
        _set(self, "_norm", norm)
        _set(self, "_site", site)
        _set(self, "_x", x)
        _set(self, "_made", made)
        _set(self, "_residual", residual)
        _set(self, "_versions", (_version(x), 0 if residual is None else _version(residual)))
        _set(self, "_modes", _modes())
        _set(self, "_value", None)
        _set(self, "_spent", False)
        made[id(self)] = self

    @property  # type: ignore[misc]  # isinstance, match and functools.singledispatch ask for it
    def __class__(self) -> Any:
        if applies(sys._getframe(1)):
            raise RuntimeError(self._unforeseen("a torch.autograd.Function applied to its result"))
        if asks_for_class(sys._getframe(1).f_code):  # to answer Tensor would mislead torch, which asks, too
            raise RuntimeError(self._unforeseen("a question of the class of its result"))
        return type(self)

    def __hash__(self) -> int:
        if asks(sys._getframe(1).f_code):  # what an activation in place returns is another object
            raise RuntimeError(self._unforeseen("a question of the hash of its result"))
        return object.__hash__(self)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._used(), name, value)

    def _waits(self) -> bool:
        """Whether the next operation may be fused."""
        return self._value is None and not self._spent and self._modes == _modes()

    def _compute(self, activation: Activation = None) -> Tensor:
        """The result of the norm, of the noted addition and of an activation; and nothing waits any more."""
        x, residual, norm = self._x, self._residual, self._norm
        text = _running.telling(self._made)
        if text is not None:
            raise RuntimeError(self._unforeseen(f"a use of its result in code, where {text},"))
        if self._versions != (_version(x), 0 if residual is None else _version(residual)):
            raise RuntimeError(
                f"{type(norm).__name__}: got an input or a residual that was modified by an inplace operation before "
                "the fused addition or activation; allowed: to convert the model without fuse"
            )
        again = self._spent
        now = state_of(norm, not (again and norm.training and norm._learns))  # its own call has changed the statistics
        if not same_state(self._state[: len(now)], now):
            raise RuntimeError(
                f"{type(norm).__name__}: got another mode, parameter, statistic or attribute than when it was called, "
                "before its result was used; allowed: to convert the model without fuse"
            )
        self._made.pop(id(self), None)
        _set(self, "_spent", True)
        if again and norm.training and norm._learns:  # the running statistics have had this batch
            y = functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
            return y if residual is None else y + residual
        return type(norm).forward(norm, x, residual, activation)

    def settled(self) -> Tensor:
        """The tensor that the norm, and the noted addition, would have returned."""
        if self._value is None and self._modes == _modes():
            _set(self, "_value", self._compute())
        elif self._value is None:
            with torch.inference_mode(self._modes[1]), torch.set_grad_enabled(self._modes[0]):
                _set(self, "_value", self._compute())
        return self._value

    def _used(self) -> Tensor:
        """The tensor, for a use that nobody foresaw."""
        if self._value is None and self._modes[0] and not torch.is_grad_enabled():
            raise RuntimeError(self._unforeseen("a use of its result without gradients"))
        return self.settled()

    def _unforeseen(self, what: str) -> str:
        return (
            f"{type(self._norm).__name__}: got {what} that torch.fx did not show when the model was converted; "
            "allowed: to convert it again after a change, or without fuse"
        )

    def _activated(self, activation: Activation, in_place: bool) -> Tensor | None:
        if not (self._site.activates and self._waits()):
            return None
        y = self._compute(activation)
        if in_place:
            _set(self, "_value", y)
        return y

    def _plus(self, other: Any, in_place: bool) -> Any:
        """The sum, which waits for an activation if one is expected; None if the addition cannot be fused."""
        if type(other) is Pending:
            other = other.settled()
        x = self._x
        if not (self._site.adds and self._residual is None and self._waits() and type(other) is Tensor):
            return None
        if other.layout is not x.layout or other.layout is not torch.strided or not other.is_cpu:
            return None
        if other.dtype is not x.dtype or other.shape != x.shape or other.stride() != x.stride():
            return None
        if in_place:
            _set(self, "_residual", other)
            _set(self, "_versions", (self._versions[0], _version(other)))
            total = self
        else:
            total = Pending(self._norm, self._site, x, self._made, other)
            _set(total, "_versions", (self._versions[0], total._versions[1]))
            self._made.pop(id(self), None)
            _set(self, "_spent", True)
        return total if self._site.activates else total.settled()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = activation_called(function, args, kwargs) if args and type(args[0]) is cls else None
        adds = found is None and is_addition(function, args, kwargs)
        y = None
        if found is not None:
            y = args[0]._activated(*found)
        elif adds and type(args[0]) is cls:
            y = args[0]._plus(args[1], is_in_place(function))
        elif adds and type(args[1]) is cls and not is_in_place(function):
            y = args[1]._plus(args[0], False)
        if y is not None:
            return y
        used = cls.settled if adds or found is not None else cls._used
        return function(*_each(args, used), **_each(kwargs, used))

    def __getattr__(self, name: str) -> Any:
        function = getattr(Tensor, name, None)
        if callable(function) and (function in _FUNCTIONS or function in _ADDITIONS):
            return lambda *args, **kwargs: type(self).__torch_function__(function, (), (self, *args), kwargs)
        return getattr(self._used(), name)

    def __add__(self, other: Any) -> Any:
        return type(self).__torch_function__(Tensor.add, (), (self, other))

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        return type(self).__torch_function__(Tensor.add_, (), (self, other))


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Pending, *args: Any) -> Any:
        return getattr(self._used(), name)(*_each(args, Pending._used))

    return method


_ALSO = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__repr__", "__str__", "__format__"}
_ALSO |= {"__dir__", "__delattr__", "__reduce__", "__reduce_ex__", "__sizeof__"}
_NOT = {"__torch_function__", "__torch_dispatch__", "__setstate__", "__deepcopy__"}
for _name in (set(dir(Tensor)) - set(dir(object)) - set(vars(Pending)) - _NOT) | _ALSO:
    if _name.startswith("__") and callable(getattr(Tensor, _name)):
        setattr(Pending, _name, _forwarded(_name))


def _each(values: Any, of: Callable[[Pending], Any]) -> Any:
    """The same structure of tuples, lists and dicts with tensors in the place of what waits."""
    if type(values) is Pending:
        return of(values)
    if type(values) in (tuple, list):
        return type(values)(_each(value, of) for value in values)
    if type(values) is dict:
        return {name: _each(value, of) for name, value in values.items()}
    return values


def _returned(values: Any) -> Any:
    """The same result with tensors in the place of what waits; objects are changed in place, one level deep."""
    if type(values) in (Pending, tuple, list, dict):
        return _each(values, Pending.settled)
    if issubclass(type(values), tuple) and hasattr(values, "_make"):
        return values._make(_returned(value) for value in values)
    if issubclass(type(values), (Tensor, nn.Module)):
        return values
    for own in (values if issubclass(type(values), dict) else {}, getattr(values, "__dict__", {})):
        for name, value in list(own.items()) if issubclass(type(own), dict) else ():
            if type(value) in (Pending, tuple, list, dict):
                own[name] = _each(value, Pending.settled)
    return values


# The forwards --------------------------------------------------------------------------------------------------------


Part = tuple[nn.Module, str, nn.Module]
"""A module that a result passes while it waits: what it is in, its name there, and itself."""


class _Running(threading.local):
    """The fused forwards that run in this thread: their sites, and what waits in them."""

    def __init__(self) -> None:
        self.stack: list[tuple[tuple[Site, ...], dict[int, Pending]]] = []

    def telling(self, made: dict[int, Pending]) -> str | None:
        """How code could tell that a result waits that runs now within the forward in which it was `made`."""
        stack, frame = self.stack, sys._getframe(2)
        inner = len(stack) - 1
        while inner >= 0 and stack[inner][1] is not made:
            inner -= 1
        if inner < 0:  # the forward is over, and what was kept of it is used
            return None
        left = len(stack) - inner
        while True:
            code = frame.f_code
            if code is _RUN:
                left -= 1
                if not left:
                    return None
            elif id(code) not in innocent:
                text = telling(frame)
                if text is not None:
                    return text
            frame = frame.f_back  # type: ignore[assignment]  # the forward is in one


_running = _Running()
_MODULE = nn.modules.module.__file__


def _called(module: Any, frame: Any) -> Any:
    """The module that is called, which is another one if it is a shallow copy, since it has the same forward then."""
    return frame.f_locals.get("self", module) if frame.f_code.co_filename == _MODULE else module


class FusedForward:
    """The forward of a module in which results of norms may wait. It runs the forward of the module's class.

    Nothing waits while torch.compile traces, or once one of the modules that take part was replaced or has got a hook.
    """

    def __init__(self, module: nn.Module, sites: tuple[Site, ...], parts: tuple[Part, ...]) -> None:
        self.module, self.sites, self.parts = module, sites, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module if _is_compiling() else _called(self.module, sys._getframe(1))
        forward = type(module).forward
        if module is not self.module or _is_compiling() or has_hooks_for_all():
            return forward(module, *args, **kwargs)
        for parent, name, part in self.parts:
            if parent._modules.get(name) is not part or has_hooks(part):
                return forward(module, *args, **kwargs)
        return self._run(forward, args, kwargs)

    def _run(self, forward: Any, args: Any, kwargs: Any) -> Any:
        made: dict[int, Pending] = {}
        _running.stack.append((self.sites, made))
        try:
            result = _returned(forward(self.module, *args, **kwargs))
            for waiting in list(made.values()):
                waiting.settled()
        finally:
            _running.stack.pop()
        return result


_RUN = FusedForward._run.__code__


class WaitingForward:
    """The forward of a norm whose result may wait, within the forward of which its site is a part."""

    def __init__(self, norm: Any, site: Site) -> None:
        self.norm, self.site = norm, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        norm = self.norm if _is_compiling() else _called(self.norm, sys._getframe(1))
        forward = type(norm).forward
        if (
            norm is self.norm
            and len(args) == 1
            and not kwargs
            and not _is_compiling()
            and type(args[0]) is Tensor
            and forward in FORWARDS
        ):
            for sites, made in reversed(_running.stack):
                if self.site in sites:
                    for waiting in [one for one in made.values() if one._norm is norm]:
                        waiting.settled()  # running statistics take the batches in the order of the calls
                    if watched(args[0]) or _has_torch_function(args) or not norm._ends_with_norm():
                        break
                    if _running.telling(made) is not None or caught(sys._getframe(1), _RUN) is not None:
                        break
                    return Pending(norm, self.site, args[0], made)
        return forward(norm, *args, **kwargs)
