"""How does one call of the kernels do a norm's work, and that of the addition and the activation after it?

In a forward that convert_batchnorm(fuse=True) has prepared, a norm returns a `Pending` in the place of a tensor. The
model's own code goes on with it, whatever that code is. An addition of a tensor of the same shape, dtype and layout is
noted. An activation computes everything in one call, and its result is a tensor. Any other use of a `Pending` computes
the tensor that the norm would have returned, so that results are always those of the model's code. Code that could tell
a `Pending` from a tensor otherwise than by its use does not get one: a norm returns one only after calls, and in a
state of the model, of which follow.py has proven that.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import Activation
from .others import ADDITIONS, FORWARDS, FUNCTIONS, activation_called, has_hooks_for_all, is_addition, is_in_place
from .proof import OURS, PLAIN, Proof, is_alias
from .syntax import prove
from .watchers import watched

_is_compiling = torch.compiler.is_compiling
_has_torch_function = torch.overrides.has_torch_function


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


def _state(norm: Any) -> list[tuple[Any, ...]]:
    """The tensors of which a norm's result is computed, and how often they were modified.

    In training, other threads may change the running statistics meanwhile.
    """
    own = norm.__dict__
    tensors = own["_parameters"] if norm.training and norm._learns else own["_parameters"] | own["_buffers"]
    return [(id(tensor), tensor.requires_grad, _version(tensor)) for tensor in tensors.values() if tensor is not None]


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
    _state: list[tuple[Any, ...]]
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
        _set(self, "_state", _state(norm))
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

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.settled(), name, value)

    def _waits(self) -> bool:
        """Whether the next operation may be fused."""
        return self._value is None and not self._spent and self._modes == _modes()

    def _compute(self, activation: Activation = None) -> Tensor:
        """The result of the norm, of the noted addition and of an activation; and nothing waits any more."""
        x, residual, norm = self._x, self._residual, self._norm
        if self._versions != (_version(x), 0 if residual is None else _version(residual)):
            raise RuntimeError(
                f"{type(norm).__name__}: got an input or a residual that was modified by an inplace operation before "
                "the fused addition or activation; allowed: to convert the model without fuse"
            )
        if self._state != _state(norm):
            raise RuntimeError(
                f"{type(norm).__name__}: got other parameters or statistics than when it was called, before its result "
                "was used; allowed: to convert the model without fuse"
            )
        again = self._spent
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
        return function(*_each(args, cls.settled), **_each(kwargs, cls.settled))

    def __getattr__(self, name: str) -> Any:
        function = getattr(Tensor, name, None)
        if callable(function) and (function in FUNCTIONS or function in ADDITIONS):
            return lambda *args, **kwargs: type(self).__torch_function__(function, (), (self, *args), kwargs)
        return getattr(self.settled(), name)

    def __add__(self, other: Any) -> Any:
        return type(self).__torch_function__(Tensor.add, (), (self, other))

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        return type(self).__torch_function__(Tensor.add_, (), (self, other))


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Pending, *args: Any) -> Any:
        return getattr(self.settled(), name)(*_each(args, Pending.settled))

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


# The forwards --------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """A fused forward that runs: what waits in it, its arguments, whether they are plain, and proofs that began."""

    of: FusedForward
    made: dict[int, Pending]
    given: tuple[Any, ...]
    plain: bool
    begun: list[Proof]

    def is_given(self, norm: Any) -> bool:
        """Whether an argument is memory of a norm's statistics, which change with its call."""
        statistics = [tensor for tensor in norm._buffers.values() if tensor is not None]
        given = [value for value in self.given if isinstance(value, Tensor)]
        return any(is_alias(value, tensor) for value in given for tensor in statistics)


class _Running(threading.local):
    """The fused forwards that run in this thread."""

    def __init__(self) -> None:
        self.stack: list[_Run] = []


_running = _Running()
_MODULE = nn.modules.module.__file__
_CALL = nn.Module._call_impl.__code__
_monitoring = getattr(sys, "monitoring", None)


def _called(module: Any, frame: Any) -> Any:
    """The module that is called, which is another one if it is a shallow copy, since it has the same forward then."""
    return frame.f_locals.get("self", module) if frame.f_code.co_filename == _MODULE else module


def _is_traced() -> bool:
    """Whether a debugger, a profiler or the like sees all values in this thread."""
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return True
    return _monitoring is not None and any(_monitoring.get_tool(number) is not None for number in range(6))


def _leads(frame: Any, proof: Proof, inner: int) -> bool:
    """Whether the calls from a fused forward to a frame are proven, those of other fused forwards within included."""
    path: list[Any] = []
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            path.append(id(frame.f_locals["self"]))
        elif code is _RUN:
            if inner == 0:
                return tuple(path) in proof.paths
            inner -= 1
        elif id(code) not in _PASSED:
            place = proof.calls.get((id(code), frame.f_lasti))
            if place is None:
                return False
            path.append(place)
        frame = frame.f_back
    return False


class FusedForward:
    """The forward of a module in which results of norms may wait. It runs the forward of the module's class.

    `places` has the norms, by their sites. Copies prove anew what is proven of them, when it is needed.
    """

    def __init__(self, module: nn.Module, places: dict[Site, nn.Module], proofs: dict[Site, Proof] | None) -> None:
        self.module, self.places, self.proofs = module, places, proofs

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"proofs": None}

    @property
    def __code__(self) -> Any:
        """The code of the forward that this one runs, whose arguments torch.export asks for."""
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward that this one runs."""
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module if _is_compiling() else _called(self.module, sys._getframe(1))
        forward = type(module).forward
        if module is not self.module or _is_compiling() or has_hooks_for_all():
            return forward(module, *args, **kwargs)
        return self._run(forward, args, kwargs)

    def _run(self, forward: Any, args: Any, kwargs: Any) -> Any:
        made: dict[int, Pending] = {}
        given = (*args, *kwargs.values())
        begun = [proof for proof in (self.proofs or {}).values() if proof.first is not None and proof.first.holds()]
        _running.stack.append(_Run(self, made, given, PLAIN.issuperset(map(type, given)), begun))
        try:
            try:
                result = forward(self.module, *args, **kwargs)
                if type(result) is Pending and result._made is made:
                    result = result.settled()
            finally:  # after an error, too: a norm that was called has had its batch, or an earlier error
                for waiting in list(made.values()):
                    waiting.settled()
        finally:
            _running.stack.pop()
        return result

    def proof(self, site: Site) -> Proof | None:
        """The proof that a result may wait at a site."""
        if self.proofs is None:
            proofs, _ = prove(self.module, self.places.values())
            self.proofs = {one: proofs[norm] for one, norm in self.places.items() if norm in proofs}
        return self.proofs.get(site)


class WaitingForward:
    """The forward of a norm whose result may wait, within the forward in which its site is."""

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
            made = self._may_wait(args[0], sys._getframe(1))
            if made is not None:
                return Pending(norm, self.site, args[0], made)
        return forward(norm, *args, **kwargs)

    def _may_wait(self, x: Tensor, frame: Any) -> dict[int, Pending] | None:
        """What waits in the forward with the site, if the result for x may wait there, too."""
        for inner, run in enumerate(reversed(_running.stack)):
            if self.site not in run.of.places:
                continue
            for waiting in [one for one in run.made.values() if one._norm is self.norm]:
                waiting.settled()  # running statistics take the batches in the order of the calls
            if watched(x) or _has_torch_function((x,)) or has_hooks_for_all() or not self.norm._ends_with_norm():
                return None
            proof = run.of.proof(self.site)
            if proof is None or (proof.plain and not run.plain) or _is_traced():
                return None
            if proof.first is not None and proof not in run.begun:
                return None
            if proof.plain and self.norm.training and run.is_given(self.norm):
                return None
            return run.made if _leads(frame, proof, inner) and proof.holds() else None
        return None


OURS.update((FusedForward, WaitingForward))
_RUN = FusedForward._run.__code__
_PASSED = {id(f.__code__) for f in (nn.Module._wrapped_call_impl, nn.Sequential.forward, FusedForward.__call__)}
"""The identities of code by which calls are passed on."""
