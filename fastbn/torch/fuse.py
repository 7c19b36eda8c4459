"""Where in a model does the result of a norm go to an addition and an activation, and to nothing else?

torch.fx records what each module's forward does; this file reads the records. They tell what is worth fusing. Whether a
result may wait for that is proven by the source: follow.py. pending.py sees to it that any other way through the code
than the one that was recorded gives the right results, too.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..ops import Activation
from .layers import _Layer
from .others import FORWARDS, activation_called, activation_of, is_addition, is_hooked, is_in_place
from .pending import FusedForward, Site, WaitingForward
from .proof import PLAIN, Proof
from .syntax import prove

_PASSING = {"DropPath", "StochasticDepth"}
"""Layers of timm and torchvision that return their input, unless they train with a rate above 0."""


class _Use(NamedTuple):
    """What follows a norm, within a module: a site, and words for the report."""

    site: Site
    text: str


class _Record(NamedTuple):
    """What the forward of a module does, in order."""

    owner: nn.Module
    nodes: list[fx.Node]

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.owner.get_submodule(node.target)


def fuse(model: nn.Module) -> dict[nn.Module, str]:
    """Prepares the forwards in which something can be fused. Returns what was, or why nothing was, for each norm."""
    times = Counter(child for parent in model.modules() for child in parent._modules.values())
    norms = [module for module in model.modules() if isinstance(module, _Layer)]
    memory = Counter(filter(None, map(_memory, (*model.parameters(), *model.buffers()))))
    texts = {norm: _reason(norm, times[norm], memory) for norm in norms}
    open_ = {norm for norm, text in texts.items() if text == ""}
    for owner in reversed(list(model.modules())):  # a module comes after all that are in it
        inside = open_ & set(owner.modules())
        if inside and owner not in texts and type(owner).forward is not nn.Module.forward:
            found, reasons, proofs = _proven(owner, inside)
            _prepare(owner, found, proofs)
            texts |= reasons | {norm: f"fused with {use.text}" for norm, use in found.items()}
            open_ -= found.keys() | {norm for norm, reason in reasons.items() if not reason.startswith(_OUTSIDE)}
    return {norm: text or "not fused: no forward that torch.fx can record calls it" for norm, text in texts.items()}


_OUTSIDE = "not fused: its result leaves"
_UNSEEN = "not fused: torch.fx cannot record"


def _memory(tensor: torch.Tensor) -> int:
    """The address of a tensor's memory; 0 for one that has none at hand."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in PLAIN else 0


def _reason(norm: Any, times: int, memory: Counter[int]) -> str:
    """Why a norm itself cannot be fused with what follows; "" if it can. `memory` has all memory of the model."""
    own = vars(norm).get("forward")
    if type(own) is WaitingForward:
        return "fused before"
    if type(norm).forward not in FORWARDS:
        return "not fused: its class has a forward of its own"
    if times > 1:
        return f"not fused: it is in {times} places of the model"
    if is_hooked(norm):
        return "not fused: it has hooks"
    if any(memory[_memory(tensor)] > 1 for tensor in norm._buffers.values() if tensor is not None):
        return "not fused: its statistics are in memory that other tensors have, too"
    return "" if norm._ends_with_norm() else "not fused: it has an activation of its own"


def _prepare(owner: nn.Module, found: dict[nn.Module, _Use], proofs: dict[nn.Module, Proof]) -> None:
    """Gives a module and the norms a forward each."""
    if not found:
        return
    before = vars(owner).get("forward")
    places: dict[Site, nn.Module] = {use.site: norm for norm, use in found.items()}
    proven: dict[Site, Proof] | None = {use.site: proofs[norm] for norm, use in found.items()}
    if type(before) is FusedForward:
        places = before.places | places
        proven = None if before.proofs is None else before.proofs | (proven or {})
    owner.forward = FusedForward(owner, places, proven)
    for norm, use in found.items():
        norm.forward = WaitingForward(norm, use.site)


# Records -------------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is, since torch.fx records a sum."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Records the forward of a module, and, if `deep`, of the modules in it that torch.nn does not have."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.deep = deep

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = vars(m).get("forward")
        if isinstance(m, _Layer) or type(m).__name__ in _PASSING or (is_hooked(m) and type(own) is not FusedForward):
            return True
        if getattr(type(m), "forward", None) is nn.Sequential.forward:  # torch.jit's have none
            return False
        return not self.deep or super().is_leaf_module(m, module_qualified_name)


def _records(owner: nn.Module) -> Iterator[_Record | str]:
    """The record of a module's forward in its mode and in the other, or why there is none."""
    for training in (owner.training, not owner.training):
        reason = ""
        for deep in (True, False):
            try:
                record = _record(owner, training, deep)
            except Exception as error:  # whatever the model's code does with what is not a tensor
                reason = f"{_UNSEEN} {type(owner).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                yield record
                break
        else:
            yield reason


def _record(owner: nn.Module, training: bool, deep: bool) -> _Record:
    """Records a copy, which shares the tensors, so that the module does not change whatever its forward does to it."""
    tensors = (*owner.parameters(), *owner.buffers())
    other = copy.deepcopy(owner, {id(tensor): tensor for tensor in tensors})
    for module in other.modules():
        module.training = training
    parameters = inspect.signature(type(other).forward).parameters.values()
    usual = {p.name: p.default for p in parameters if isinstance(p.default, (bool, int, float, str, type(None)))}
    with torch.random.fork_rng(devices=[]):
        graph = _Tracer(deep).trace(other, usual)
    return _Record(owner, list(graph.nodes))


# Proofs --------------------------------------------------------------------------------------------------------------


def _proven(
    owner: nn.Module, norms: set[nn.Module]
) -> tuple[dict[nn.Module, _Use], dict[nn.Module, str], dict[nn.Module, Proof]]:
    """What follows norms in a module's forward, why nothing is fused with others, and the proofs."""
    if "forward" in vars(owner) and type(vars(owner)["forward"]) is not FusedForward:
        why = f"{_UNSEEN} a forward that is not of the class {type(owner).__name__}"
        return {}, dict.fromkeys(norms, why), {}
    records = list(_records(owner))
    refused: dict[nn.Module, str] = {}
    while True:
        found, reasons = _uses(records, norms - refused.keys())
        proofs, why_not = prove(owner, found) if found else ({}, {})
        if not why_not:
            return found, reasons | refused, proofs
        refused |= {norm: f"not fused: {why}" for norm, why in why_not.items()}  # others may have the additions then


def _uses(records: list[_Record | str], norms: set[nn.Module]) -> tuple[dict[nn.Module, _Use], dict[nn.Module, str]]:
    """What follows the norms in records, and why nothing can be fused with the others."""
    found: dict[nn.Module, _Use] = {}
    reasons: dict[nn.Module, str] = {}
    for record in records:
        if isinstance(record, str):
            reasons |= dict.fromkeys(norms - reasons.keys(), record)
            continue
        taken: set[fx.Node] = set()
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in record.nodes:
            if node.op == "call_module":
                calls.setdefault(record.module(node), []).append(node)
        for norm in [norm for norm in calls if norm in norms]:
            use = _use(record, calls[norm], taken)
            if isinstance(use, str):
                reasons[norm] = f"not fused: {use}"
            elif norm not in found:
                found[norm] = use
    return found, {norm: reason for norm, reason in reasons.items() if norm not in found}


def _use(record: _Record, calls: list[fx.Node], taken: set[fx.Node]) -> _Use | str:
    """What may be fused with a norm, or why nothing may. An addition that is fused is `taken` for another norm."""
    norm = calls[0]
    if len(calls) > 1:
        return f"it is called {len(calls)} times"
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        return "it is called with more than its input"
    chain, addition, activation = _chain(record, norm, taken)
    if len(chain) == 1:
        return _why(record, norm, taken)
    if not _undisturbed(record, chain, addition):
        return "other operations run before what follows it, which might change its input"
    taken |= {addition} - {None}
    words = ["the addition"] * (addition is not None) + [activation] * bool(activation)
    return _Use(Site(addition is not None, bool(activation)), " and ".join(words))


def _chain(record: _Record, norm: fx.Node, taken: set[fx.Node]) -> tuple[list[fx.Node], fx.Node | None, str]:
    """The nodes from a norm to the last that can be fused, the addition among them, and the activation's name."""
    chain, last, addition = [norm], 1, None
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        chain.append(user)
        if addition is None and user not in taken and _adds(user, chain[-2]):
            addition, last = user, len(chain)
        elif not _passes(record, user):
            activation = _activation(record, user, chain[-2])
            if activation is None:
                break
            return chain, addition, activation if isinstance(activation, str) else activation[0]
    return chain[:last], addition, ""


def _why(record: _Record, node: fx.Node, taken: set[fx.Node]) -> str:
    """Why nothing that follows can be fused."""
    while len(node.users) == 1:
        (node,) = node.users
        if _passes(record, node):
            continue
        if node.op == "output":
            return f"its result leaves {type(record.owner).__name__}"
        if node in taken:
            return "the addition that follows is fused with another norm"
        name = type(record.module(node)).__name__ if node.op == "call_module" else node.target
        return f"{getattr(name, '__name__', name)} follows it"
    return f"its result is used {len(node.users)} times"


def _passes(record: _Record, node: fx.Node) -> bool:
    """Whether a node gives its input on, as nn.Identity does."""
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return False
    module = record.module(node)
    return not is_hooked(module) and (type(module) is nn.Identity or type(module).__name__ in _PASSING)


def _function(node: fx.Node) -> Any:
    """The function that a node calls, also if it is called as a tensor's method."""
    if node.op == "call_method":
        return getattr(torch.Tensor, node.target, None)
    return node.target if node.op == "call_function" else None


def _adds(node: fx.Node, one: fx.Node) -> bool:
    """Whether a node computes the sum of one term and another, which is not the same."""
    function = _function(node)
    if function is None or not is_addition(function, node.args, dict(node.kwargs)):
        return False
    first, second = node.args
    if is_in_place(function) and first is not one:
        return False
    other = second if first is one else first
    return isinstance(other, fx.Node) and other is not one


def _activation(record: _Record, node: fx.Node, one: fx.Node) -> Activation:
    """The activation that a node computes of `one`; None if it is another, or something else."""
    if not node.args or node.args[0] is not one:
        return None
    if node.op == "call_module":
        module = record.module(node)
        return None if is_hooked(module) or len(node.args) > 1 or node.kwargs else activation_of(module)
    function = _function(node)
    found = None if function is None else activation_called(function, node.args, dict(node.kwargs))
    return None if found is None else found[0]


def _undisturbed(record: _Record, chain: list[fx.Node], addition: fx.Node | None) -> bool:
    """Whether nothing that runs before the last of the chain can change the norm's input, or read its statistics.

    Nothing else runs; or it runs before the addition, and the norm's input is new memory that nobody else has.
    """
    nodes, norm = record.nodes, chain[0]
    others = [node for node in nodes[nodes.index(norm) : nodes.index(chain[-1])] if node not in chain]
    if not others:
        return True
    if any(node.op == "get_attr" and node.target.startswith(f"{norm.target}.") for node in others):
        return False
    if addition is None or any(nodes.index(node) > nodes.index(addition) for node in others):
        return False
    source = norm.args[0]
    if source.op != "call_module" or len(source.users) > 1 or is_hooked(record.module(source)):
        return False
    return isinstance(record.module(source), (nn.modules.conv._ConvNd, nn.Linear))
