"""Which norms of timm and torchvision, and which activations of torch, does fastbn know?

A converted norm stays an instance of its own class: it gets a class that is derived from fastbn's layer and from its
own, made once for each class. Its parts, hooks and state are used as they are at each call.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional
from torch.nn.modules import module as modules_of_torch

from ..ops import Activation
from .formulas import activated
from .layers import BatchNorm2d, _Layer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
}


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of the module sees its calls."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody sees the module called: a hook, or a `forward` of the instance's own."""
    return "forward" in module.__dict__ or has_hooks(module)


def has_hooks_for_all() -> bool:
    """Whether a hook of torch.nn.modules.module is registered for all modules."""
    of = modules_of_torch
    return bool(
        of._global_forward_hooks
        or of._global_forward_pre_hooks
        or of._global_backward_hooks
        or of._global_backward_pre_hooks
    )


def activation_of(module: nn.Module) -> Activation:
    """The activation that a module of torch computes, as fastbn names it; None if fastbn has not got it."""
    name = ACTIVATIONS.get(type(module))
    if name == "leaky_relu":
        slope = module.negative_slope
        return ("leaky_relu", slope) if isinstance(slope, float) and abs(slope) < torch.inf else None
    if name == "relu6" and (module.min_val, module.max_val) != (0, 6):
        return None
    return name


_IN_PLACE = {"inplace": False}
FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
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

ADDITIONS = {operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_}
_ADDITIONS_IN_PLACE = {operator.iadd, Tensor.add_}


def activation_called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Activation, bool] | None:
    """The activation that a call computes, and whether it does so in place; None if it is not one to fuse."""
    if function not in FUNCTIONS:
        return None
    name, parameters = FUNCTIONS[function]
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
    return function in ADDITIONS and len(args) == 2 and not kwargs


def is_in_place(function: Any) -> bool:
    """Whether an addition writes into its first argument."""
    return function in _ADDITIONS_IN_PLACE


def is_idle(module: nn.Module) -> bool:
    """Whether a module does nothing, and nobody sees it called."""
    return type(module) is nn.Identity and not is_hooked(module)


class _Borrowed(nn.Module):
    """What is common to the classes that are made here, which pickles find by the class that a layer had."""

    had: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.had,), *super().__reduce_ex__(protocol)[2:]


def _restored(had: type) -> nn.Module:
    ours: Any = class_for(had)
    return ours.__new__(ours)


class _WithActivation(_Borrowed, _Layer):
    """A norm with the modules `drop` and `act` after it. They are part of the call, or run after it if they must."""

    def _parts(self) -> tuple[nn.Module, nn.Module]:
        parts = self._modules
        return parts["drop"], parts["act"]

    @property
    def activation(self) -> Activation:  # type: ignore[override]
        drop, act = self._parts()
        if is_idle(drop) and not is_hooked(act) and not has_hooks_for_all():
            return activation_of(act)
        return None

    def _ends_with_norm(self) -> bool:
        return all(map(is_idle, self._parts())) and not has_hooks_for_all()

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: Activation = None) -> Tensor:
        if isinstance(input, Proxy):
            return self._by_torch(input, residual, activation)
        drop, act = self._parts()
        if is_idle(drop) and not is_hooked(act) and not has_hooks_for_all():
            fused = activation_of(act)
            if fused is not None or type(act) is nn.Identity:
                return super().forward(input, residual, activation or fused)
        y = drop(super().forward(input, residual))
        return act(y) if activation is None else activated(y, activation)

    def extra_repr(self) -> str:
        return super(_Layer, self).extra_repr()


class _Frozen(_Borrowed, _Layer):
    """A norm whose four arrays are buffers, in training, too. It computes in the dtype of its buffers."""

    _learns = False
    momentum = 0.0
    track_running_stats = False

    @property
    def num_features(self) -> int:
        return int(self.weight.numel())

    def _check_input_dim(self, input: Tensor) -> None:
        """The shape was checked by `forward`."""

    def _tensors(self, compiles: bool) -> tuple[Any, Any, Any, Any, Any]:
        return self.weight, self.bias, self.running_mean, self.running_var, None

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: Activation = None) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 4 and self._is_of(input.dtype):
            return super().forward(input, residual, activation)
        return self._by_torch(input, residual, activation)

    def _is_of(self, dtype: torch.dtype) -> bool:
        return all(tensor.dtype is dtype for tensor in self._tensors(False)[:4])

    def _normalized_by_torch(self, input: Tensor) -> Tensor:
        weight, bias, mean, var = (tensor.reshape(1, -1, 1, 1) for tensor in self._tensors(False)[:4])
        scale = weight * (var + self.eps).rsqrt()
        return input * scale + (bias - mean * scale)


class _Trained(_WithActivation, BatchNorm2d):
    def _normalized_by_torch(self, input: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, input)


class _FrozenWithActivation(_WithActivation, _Frozen):
    pass


FORWARDS = (_Layer.forward, _WithActivation.forward, _Frozen.forward)
"""The forwards that take a residual and an activation."""

_KNOWN: dict[str, tuple[type, type]] = {
    "BatchNormAct2d": (_Trained, nn.BatchNorm2d),
    "FrozenBatchNormAct2d": (_FrozenWithActivation, nn.Module),
    "FrozenBatchNorm2d": (_Frozen, nn.Module),
}
"""For the names of classes in timm.layers and torchvision.ops: what they become, and what they are derived from."""

_made: dict[type, type] = {}


def class_for(theirs: type) -> type:
    """The class that stands for a class of timm or torchvision; the same one at each call."""
    if theirs not in _made:
        base, _ = _KNOWN[theirs.__name__]
        names = {"had": theirs, "__module__": "fastbn.torch", "__qualname__": theirs.__qualname__}
        _made[theirs] = type(theirs.__name__, (base, theirs), names)
    return _made[theirs]


def reason_against(module: nn.Module) -> str | None:
    """Why a module is none of the norms of timm and torchvision that fastbn knows; None if it is one.

    Its class is known by its name. It must have the parts that this class is known to have, no others, and compute what
    it is known to compute, which is tried: another version of the library may differ.
    """
    theirs = type(module)
    if theirs.__name__ not in _KNOWN or _KNOWN[theirs.__name__][1] not in (theirs.__base__,):
        return f"fastbn does not know {theirs.__module__}.{theirs.__qualname__}"
    ours = _KNOWN[theirs.__name__][0]
    expected = {"drop", "act"} if issubclass(ours, _WithActivation) else set()
    if set(module._modules) != expected or None in module._modules.values():
        return f"its parts are {', '.join(module._modules) or 'none'}, not {' and '.join(sorted(expected)) or 'none'}"
    try:
        agrees = _agrees(module)
    except Exception as error:  # of another make
        return f"a call of it on random numbers fails: {type(error).__name__}: {error}"
    return None if agrees else "it does not compute what the class of this name in timm or torchvision computes"


def _agrees(module: nn.Module) -> bool:
    """Whether a copy of the module gives fastbn's results and running statistics, in training and not."""
    theirs = _for_trial(module)
    ours = _for_trial(module)
    ours.__class__ = class_for(type(module))
    x = _random((2, ours.num_features, 3, 2), 0)
    with torch.no_grad():
        for training in (True, False):
            results = [type(one).forward(one.train(training), x) for one in (theirs, ours)]
            state = zip(theirs.buffers(), ours.buffers(), strict=True)
            if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in (results, *state)):
                return False
    return True


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu") + 0.5


def _for_trial(module: nn.Module) -> Any:
    """A copy in float64 on the CPU, of random state, with a ReLU as its activation, without hooks."""
    other = object.__new__(type(module))
    vars(other).update({name: copy.copy(value) for name, value in vars(module).items()})
    for hooks in _HOOKS:
        vars(other)[hooks].clear()
    ones = {"drop": nn.Identity(), "act": nn.ReLU()}
    vars(other)["_modules"] = {name: ones[name] for name in module._modules}
    for kind in ("_parameters", "_buffers"):
        for seed, (name, tensor) in enumerate(vars(module)[kind].items()):
            if tensor is not None and tensor.is_floating_point():
                vars(other)[kind][name] = _random(tuple(tensor.shape), len(kind) + seed)
            elif tensor is not None:
                vars(other)[kind][name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    return other
