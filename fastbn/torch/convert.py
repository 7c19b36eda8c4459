"""How is a model converted to fastbn's layers, and back?"""

from typing import NamedTuple

import torch

from ..call import checks
from .fuse import fuse as fuse_what_follows
from .layers import _LAYERS, _TORCHS, _Layer
from .others import _Borrowed, activation_of, class_for, is_hooked, is_idle, reason_against
from .pending import FusedForward, WaitingForward


class Entry(NamedTuple):
    """What `convert_batchnorm` says of one layer in its report."""

    name: str
    """The layer's name in the model; "" for the model itself."""
    layer: str
    """The class that it had."""
    converted: bool
    """Whether fastbn computes it now."""
    note: str
    """What was done, and what was not and why."""

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.layer}): {self.note}"


def convert_batchnorm(
    model: torch.nn.Module, *, fuse: bool = False, report: list[Entry] | None = None
) -> torch.nn.Module:
    """Converts each batch norm in the model to fastbn's layer, in place, and returns the model.

    These are torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm, timm's BatchNormAct2d and FrozenBatchNormAct2d, and
    torchvision's FrozenBatchNorm2d. The layers stay the same objects: parameters, buffers, hooks, mode, device and
    dtype do not change, and an optimizer keeps its references to the parameters. `revert_batchnorm` is the inverse. To
    convert a model twice is to convert it once.

    Subclasses that a model defines itself are not converted, nor are layers whose instances have a forward of their
    own, or an attribute `activation`, which has a meaning in fastbn's layers. `report` says why.

    timm's and torchvision's layers are recognized by the name of the class, by their parts, and by a trial: a copy must
    give on random numbers what fastbn gives. They stay instances of the class that they had. The activation of timm's
    layers is computed in the same pass over memory if it is torch.nn's ReLU, ReLU6, LeakyReLU, SiLU, Hardswish or
    Sigmoid. Any other runs after the norm; so does each where `drop` is not an Identity, or where `drop` or `act` has
    hooks. Both modules may be replaced at any time. torchvision's layer is computed by fastbn for inputs of the dtype
    of its buffers, and by its own formula for others. Its gradient needs the input, which must not be modified in
    place, as that of torch.nn.BatchNorm2d.

    With `fuse`, such an activation after a norm, and an addition before it or alone, are computed in the same pass over
    memory, too, whether they are modules, functions or methods. torch.fx must show that the norm is called once, that
    its result goes to the addition or activation alone, and that nothing which runs before could change its input. The
    forward of the norm and that of the module which calls both are then replaced, for these instances. Classes do not
    change, and the model's own code runs as before, but a fused norm returns a placeholder. The addition or activation
    that was recorded computes both at once; any other use computes the norm alone.

    No code can tell the placeholder from a tensor: this is proven before a norm is fused, from the source of all
    functions through which its result goes. There it may be added, go into the activations above, be used by methods,
    operators and attributes of tensors, and be passed to modules, functions and methods of the model that are read in
    turn. Nothing else may get it, and nothing else may run while it waits but torch's layers and functions. Nothing is
    fused, therefore, in code whose source is not at hand (typed at a prompt, compiled), in `with`, `try` and `match`
    statements, nested functions and comprehensions, with functions out of lists, dicts or closures, and in what
    `super()` calls. A Sequential of torch's layers needs no source of the model. What the proof rests on (attributes,
    modules and their order, functions, hooks) is checked at each call, so that a norm whose surroundings have changed
    returns a tensor. So it does where the forward was called otherwise, while sys.settrace, sys.setprofile or
    sys.monitoring has a tool, and while torch.compile, torch.export, torch.jit.trace, torch.fx, torch.func or a mode is
    at work. The sum is computed apart where its terms differ in shape, dtype or memory format.

    Five things are not seen. What runs by itself (`__del__`, callbacks of weak references, signals) or in another
    thread, and modifies a norm's input or parameters before its activation, makes the call raise a RuntimeError.
    Methods that were replaced in a single tensor may meet the placeholder. The attribute `forward` of a shallow copy of
    a module is the original's, while to call the copy itself is right. A Sequential whose dictionary `_modules` is
    replaced while it runs, and tensors that are made to share the memory of running statistics after the conversion, by
    assigning to their data, are not noticed: convert the model without `fuse` then.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a layer.
    fuse : bool
        Whether to fuse what follows the norms. Parts of the model may be exchanged later; they are fused, too, once it
        is converted again.
    report : list, optional
        Gets an entry for each batch norm in the model, with the attributes `name` (of the layer in the model), `layer`
        (the class it had), `converted` (True or False) and `note` (what was done, and why not more). str(entry) is a
        sentence.

    Raises
    ------
    TypeError
        If `model` is not a torch.nn.Module, `fuse` is not a bool, or `report` is not a list. Nothing is changed then.

    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> report = []
    >>> model = fastbn.torch.convert_batchnorm(model, fuse=True, report=report)
    >>> isinstance(model[1], fastbn.torch.BatchNorm2d)
    True
    >>> print(*report)
    1 (BatchNorm2d): converted; fused with relu
    """
    checks.instance("model", model, torch.nn.Module, "a torch.nn.Module")
    fuses = checks.flag("fuse", fuse)
    if report is not None:
        checks.instance("report", report, list, "a list, or None")
    norms = [(name, module, type(module)) for name, module in model.named_modules() if _is_norm(module)]
    notes = {module: _convert(module) for _, module, _ in norms}
    fused = fuse_what_follows(model) if fuses else {}
    if report is not None:
        for name, module, had in norms:
            note = notes[module] if module not in fused else f"{notes[module]}; {fused[module]}"
            report.append(Entry(name, had.__name__, isinstance(module, _Layer), note))
    return model


def _is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a batch norm, by its class or by its name."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or "BatchNorm" in type(module).__name__


def _convert(module: torch.nn.Module) -> str:
    """Gives a batch norm fastbn's class, if there is one, and says what was done."""
    if isinstance(module, _Layer):
        return "fastbn's already"
    if "forward" in vars(module):
        return "left alone: it has a forward of its own"
    if hasattr(module, "activation"):
        return "left alone: it has an attribute activation, which has a meaning in fastbn's layers"
    if type(module) in _LAYERS:
        module.__class__ = _LAYERS[type(module)]
        return "converted"
    reason = reason_against(module)
    if reason is not None:
        return f"left alone: {reason}"
    module.__class__ = class_for(type(module))
    return f"converted{_what_follows(module)}"


def _what_follows(module: torch.nn.Module) -> str:
    """What becomes of the drop layer and the activation that timm's layers have."""
    parts = module._modules
    if not parts or all(map(is_idle, parts.values())):
        return ""
    drop, act = parts["drop"], parts["act"]
    if not is_idle(drop) or is_hooked(act):
        why = "hooks see them" if type(drop) is torch.nn.Identity else f"{type(drop).__name__} is between"
        return f"; its {type(act).__name__} runs after it: {why}"
    known = activation_of(act)
    if known is None:
        return f"; its {type(act).__name__} runs after it: fastbn has no such activation"
    return f" with its {type(act).__name__}"


def revert_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Converts each of fastbn's layers in the model back, in place, and returns the model.

    It undoes `convert_batchnorm`, fused or not, and `convert_sync_batchnorm`: classes and forwards are again those that
    the model had. It also converts layers that were created as fastbn's. torch.jit.script needs this, and so do tools
    that look layers up by class, such as torch.ao.quantization.fuse_modules. The layers stay the same objects.
    Subclasses are not converted. Torch's layers refuse a residual that the model may pass to them.

    Raises
    ------
    TypeError
        If `model` is not a torch.nn.Module.
    ValueError
        If a layer has an activation that it did not have before it was converted, and which torch's layers do not
        support. No layer is changed then.

    >>> import torch, fastbn.torch
    >>> model = fastbn.torch.convert_batchnorm(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)))
    >>> type(fastbn.torch.revert_batchnorm(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    named = list(checks.instance("model", model, torch.nn.Module, "a torch.nn.Module").named_modules())
    for name, layer in named:
        if type(layer) in _TORCHS and layer.activation is not None:
            where = f"the layer {name!r} in it" if name else "a layer"
            raise ValueError(
                f"model: got {where} with activation={layer.activation!r}; allowed: layers without an activation, as "
                "torch's are: set the layer's activation to None and put a module with that activation after it"
            )
    for _, module in named:
        if type(vars(module).get("forward")) in (FusedForward, WaitingForward):
            del module.forward
        if type(module) in _TORCHS:
            vars(module).pop("activation", None)
            before = vars(module).pop("_reverts_to", None)  # set by convert_sync_batchnorm
            if before is not None:
                vars(module).pop("process_group", None)
            module.__class__ = before or _TORCHS[type(module)]
        elif isinstance(module, _Borrowed):
            module.__class__ = module.had
    return model
