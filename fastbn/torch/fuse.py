"""Where in a model does the result of a norm go to an addition and an activation, and to nothing else?

torch.fx records what each module's forward does; this file reads the records. What follows a norm is fused if nobody
else can see the difference. The record proves it for the way through the code that was recorded: pending.py sees to it
that any other way gives the right results, too.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..ops import Activation
from .layers import _Layer
from .others import activation_of, is_hooked
from .pending import FusedForward, Site, WaitingForward, activation_called, is_addition, is_in_place

_PASSING = {"DropPath", "StochasticDepth"}
"""Layers of timm and torchvision that return their input, unless they train with a rate above 0."""


class _Use(NamedTuple):
    """What follows a norm, within a module: a site, the modules that take part, and words for the report."""

    site: Site
    parts: tuple[nn.Module, ...]
    text: str


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; torch.fx records a sum."""

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
        if type(m).forward is nn.Sequential.forward:
            return False
        return not self.deep or super().is_leaf_module(m, module_qualified_name)


def fuse(model: nn.Module) -> dict[nn.Module, str]:
    """Prepares the forwards in which something can be fused. Returns what was, or why nothing was, for each norm."""
    times = Counter(child for parent in model.modules() for child in parent._modules.values())
    norms = [module for module in model.modules() if isinstance(module, _Layer)]
    texts = {norm: _reason(norm, times[norm]) for norm in norms}
    open_ = {norm for norm, text in texts.items() if text == ""}
    for owner in reversed(list(model.modules())):  # a module comes after all that are in it
        inside = open_ & set(owner.modules())
        if inside and owner not in texts and type(owner).forward is not nn.Module.forward:
            found, reasons = _uses(owner, inside)
            _prepare(owner, found)
            texts |= reasons | {norm: f"fused with {use.text}" for norm, use in found.items()}
            open_ -= found.keys() | {norm for norm, reason in reasons.items() if not reason.startswith(_OUTSIDE)}
    return {norm: text or "not fused: no forward that torch.fx can record calls it" for norm, text in texts.items()}


_OUTSIDE = "not fused: its result leaves"
_UNSEEN = "not fused: torch.fx cannot record"


def _reason(norm: Any, times: int) -> str:
    """Why a norm itself cannot be fused with what follows; "" if it can."""
    own = vars(norm).get("forward")
    if type(own) is WaitingForward:
        return "fused before"
    if times > 1:
        return f"not fused: it is in {times} places of the model"
    if is_hooked(norm):
        return "not fused: it has hooks"
    return "" if norm._ends_with_norm() else "not fused: it has an activation of its own"


def _prepare(owner: nn.Module, found: dict[nn.Module, _Use]) -> None:
    """Gives a module and the norms a forward each."""
    if not found:
        return
    before = vars(owner).get("forward")
    sites: tuple[Site, ...] = tuple(use.site for use in found.values())
    parts = tuple(dict.fromkeys(part for use in found.values() for part in use.parts))
    if type(before) is FusedForward:
        sites, parts = before.sites + sites, tuple(dict.fromkeys(before.seen + parts))
    owner.forward = FusedForward(owner, sites, parts)
    for norm, use in found.items():
        norm.forward = WaitingForward(norm, use.site)


# Records -------------------------------------------------------------------------------------------------------------


def _uses(owner: nn.Module, norms: set[nn.Module]) -> tuple[dict[nn.Module, _Use], dict[nn.Module, str]]:
    """What follows the norms in a module's forward, and why nothing can be fused with the others that it calls."""
    found: dict[nn.Module, _Use] = {}
    reasons: dict[nn.Module, str] = {}
    if "forward" in vars(owner) and type(vars(owner)["forward"]) is not FusedForward:
        return found, {norm: f"{_UNSEEN} a forward that is not of the class {type(owner).__name__}" for norm in norms}
    for graph in _records(owner):
        if isinstance(graph, str):
            reasons |= dict.fromkeys(norms - reasons.keys(), graph)
            continue
        taken: set[fx.Node] = set()
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(owner.get_submodule(node.target), []).append(node)
        for norm in [norm for norm in calls if norm in norms]:
            use = _use(owner, graph, calls[norm], taken)
            if isinstance(use, str):
                reasons[norm] = f"not fused: {use}"
            elif norm not in found:
                found[norm] = use
    return found, {norm: reason for norm, reason in reasons.items() if norm not in found}


def _records(owner: nn.Module) -> Iterator[fx.Graph | str]:
    """The record of a module's forward in its mode and in the other, or why there is none.

    A copy is recorded, which shares the tensors, so that the module does not change whatever its forward does to it.
    """
    for training in (owner.training, not owner.training):
        error = ""
        for deep in (True, False):
            try:
                tensors = (*owner.parameters(), *owner.buffers())
                other = copy.deepcopy(owner, {id(tensor): tensor for tensor in tensors})
                for module in other.modules():
                    module.training = training
                with torch.random.fork_rng(devices=[]):
                    graph = _Tracer(deep).trace(other)
                yield graph
                break
            except Exception as refused:  # whatever the model's code does with what is not a tensor
                error = f"{_UNSEEN} {type(owner).__name__}: {str(refused).partition(chr(10))[0]}"
        else:
            yield error


# Proofs --------------------------------------------------------------------------------------------------------------


def _use(owner: nn.Module, graph: fx.Graph, calls: list[fx.Node], taken: set[fx.Node]) -> _Use | str:
    """What may be fused with a norm, or why nothing may. An addition that is fused is `taken` for another norm."""
    norm = calls[0]
    if len(calls) > 1:
        return f"it is called {len(calls)} times"
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        return "it is called with more than its input"
    chain, words, addition = [norm], [], None
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        if _passes(owner, user):
            chain.append(user)
        elif addition is None and user not in taken and _adds(user, chain[-1]):
            addition, words = user, ["the addition"]
            chain += [user]
        elif (activation := _activation(owner, user, chain[-1])) is not None:
            chain.append(user)
            words.append(activation if isinstance(activation, str) else activation[0])
            break
        else:
            break
    else:
        user = None
    activates = bool(words) and words[-1] != "the addition"
    if not words:
        if user is None:
            return f"its result is used {len(chain[-1].users)} times"
        if user.op == "output":
            return f"its result leaves {type(owner).__name__}"
        if user in taken:
            return "the addition that follows is fused with another norm"
        return f"{_name(owner, user)} follows it"
    while chain[-1] is not addition and not (activates and chain[-1] is user):
        chain.pop()  # what passes after the addition
    if not _undisturbed(owner, graph, chain, addition):
        return "other operations run before what follows it, which might change its input"
    taken |= {addition} - {None}
    return _Use(Site(addition is not None, activates), _parts(owner, chain), " and ".join(words))


def _passes(owner: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return False
    module = owner.get_submodule(node.target)
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


def _activation(owner: nn.Module, node: fx.Node, one: fx.Node) -> Activation:
    """The activation that a node computes of `one`; None if it is another, or something else."""
    if not node.args or node.args[0] is not one:
        return None
    if node.op == "call_module":
        module = owner.get_submodule(node.target)
        return None if is_hooked(module) or len(node.args) > 1 or node.kwargs else activation_of(module)
    function = _function(node)
    found = None if function is None else activation_called(function, node.args, dict(node.kwargs))
    return None if found is None else found[0]


def _undisturbed(owner: nn.Module, graph: fx.Graph, chain: list[fx.Node], addition: fx.Node | None) -> bool:
    """Whether nothing that runs before the last of the chain can change the norm's input, or read its statistics.

    Nothing else runs; or it runs before the addition, and the norm's input is new memory that nobody else has.
    """
    first, last = chain[0], chain[-1]
    nodes = list(graph.nodes)
    others = [node for node in nodes[nodes.index(first) : nodes.index(last)] if node not in chain]
    if not others:
        return True
    if any(node.op == "get_attr" and node.target.startswith(f"{first.target}.") for node in others):
        return False
    if addition is None or any(nodes.index(node) > nodes.index(addition) for node in others):
        return False
    source = first.args[0]
    if source.op != "call_module" or len(source.users) > 1:
        return False
    module = owner.get_submodule(source.target)
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not is_hooked(module)


def _parts(owner: nn.Module, chain: list[fx.Node]) -> tuple[nn.Module, ...]:
    """The modules of a chain, and those that they are in, within the owner: none may have hooks when it is fused."""
    names: dict[str, None] = {}
    for node in chain:
        if node.op == "call_module":
            parts = node.target.split(".")
            names |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return tuple(dict.fromkeys(owner.get_submodule(name) for name in names))


def _name(owner: nn.Module, node: fx.Node) -> str:
    """What a node calls, in words."""
    if node.op == "call_module":
        return type(owner.get_submodule(node.target)).__name__
    return str(getattr(node.target, "__name__", node.target))
