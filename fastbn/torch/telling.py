"""Which Python code could tell that what it is given only stands for a tensor, and take another way then?

While a forward is recorded, a proxy stands for each tensor; while a norm's result waits, a `Pending` does. Both serve
the operations of tensors, and notice isinstance. But `type(y)` tells in silence, and so do whether `act(y) is y`, and
an error that a tensor would not cause. Numbers could be others then, so code that does so must never see them. It is
found by its names and instructions, in all that runs while a forward is recorded, and in the functions, methods and
modules that this code names. Python's library and torch are trusted: what they are told does not change their results.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import enum
import functools
import inspect
import itertools
import operator
import os
import sys
from collections.abc import Iterable
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import autograd, fx, nn, overrides

_TELLING: dict[int, str] = {
    id(type): "type()",
    id(id): "id()",
    id(builtins): "builtins",
    id(vars(builtins)): "__builtins__",
    id(operator.is_): "operator.is_()",
    id(operator.is_not): "operator.is_not()",
    id(overrides.has_torch_function): "has_torch_function()",
    id(overrides.has_torch_function_unary): "has_torch_function_unary()",
    id(overrides.has_torch_function_variadic): "has_torch_function_variadic()",
    id(fx.Proxy): "torch.fx.Proxy",
    id(contextlib.suppress): "contextlib.suppress()",
}
"""Objects that tell, by their identities."""

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "state_dict"}
_STATISTICS |= {"_buffers", "buffers", "named_buffers", "get_buffer"}
"""Attributes by which code could see that the running statistics have not been updated yet."""

_APPLY: CodeType = autograd.Function.apply.__func__.__code__
"""It takes what stands for a tensor for something that has no gradient, since it looks for tensors in C."""

_TRUSTED = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (os, torch))
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_OTHERS = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)
_CLASS = {"isinstance", "__class__"}
_ENDS = (StopIteration, StopAsyncIteration, GeneratorExit)
_CALLABLE = (FunctionType, MethodType, functools.partial)
_PLAIN = (type, FunctionType, ModuleType, enum.Enum, enum.property)
_trusted: dict[int, tuple[CodeType, bool]] = {}
_catching: dict[int, tuple[CodeType, bool]] = {}
_known: dict[int, tuple[CodeType, str | None]] = {}
"""What was found out about code, by its identity, since its hash takes long. It is kept, so that the identity stays."""
innocent: set[int] = set()
"""The identities of code that cannot tell."""


def _is_trusted(code: CodeType) -> bool:
    """Whether code is Python's, torch's or fastbn's."""
    found = _trusted.get(id(code))
    if found is None:
        file = code.co_filename
        library, of_torch = (file.startswith(folder) for folder in _TRUSTED)
        library = (library and not any(part in file for part in _OTHERS)) or file.startswith("<frozen ")
        found = _trusted[id(code)] = code, library or of_torch or file.startswith(_OURS)
    return found[1]


def telling(frame: FrameType) -> str | None:
    """How the code that runs in a frame could tell, in words; None if it cannot."""
    code = frame.f_code
    found = _known.get(id(code))
    if found is None:
        found = _known[id(code)] = code, _Scan().frame(frame)
        if found[1] is None:
            innocent.add(id(code))
    return found[1]


def asks(code: CodeType) -> bool:
    """Whether code that a question comes from is a model's, or answers models, as torch.is_tensor does.

    torch asks for its own sake, too.
    """
    file = code.co_filename
    return file == torch.__file__ or not file.startswith((_TRUSTED[1], _OURS))


def asks_for_class(code: CodeType) -> bool:
    """Whether code that a question of a class comes from asks itself. torch asks in C for any code that calls it."""
    if _is_trusted(code) or not asks(code):
        return asks(code)
    if not _CLASS.isdisjoint((*code.co_names, *code.co_consts)):
        return True
    return any(step.opname == "MATCH_CLASS" for step in dis.get_instructions(code))


def applies(frame: FrameType | None) -> bool:
    """Whether the question of a class that comes from a frame is that of a torch.autograd.Function which is applied."""
    for _ in range(3):
        if frame is not None:
            if frame.f_code is _APPLY:
                return True
            frame = frame.f_back
    return False


def catches(code: CodeType) -> bool:
    """Whether code catches errors, or runs some of its own after one, otherwise than in a with statement."""
    found = _catching.get(id(code))
    if found is None:
        names = [step.opname for step in dis.get_instructions(code)] if code.co_exceptiontable else []
        handlers = {after for name, after in itertools.pairwise(names) if name == "PUSH_EXC_INFO"}
        found = _catching[id(code)] = code, not handlers <= {"WITH_EXCEPT_START"}
    return found[1]


def caught(frame: FrameType | None, until: CodeType) -> str | None:
    """What code between a frame and that which runs `until` would catch an error of a norm, in words."""
    while frame is not None and frame.f_code is not until:
        if not _is_trusted(frame.f_code) and catches(frame.f_code):
            return _words(frame.f_code, "try")
        frame = frame.f_back
    return None


class _Scan:
    """Finds what could tell in code, and in what it names. Each code is looked at once."""

    def __init__(self) -> None:
        self._seen: dict[int, CodeType] = {}

    def frame(self, frame: FrameType) -> str | None:
        """In the code that runs in a frame, and in its arguments."""
        code = frame.f_code
        if id(code) in self._seen or _is_trusted(code):
            return None
        given = dict(frame.f_locals)
        owner = given.get(code.co_varnames[0]) if code.co_argcount else None
        return self._values(given.values(), code) or self._code(code, frame.f_globals, owner)

    def module(self, module: nn.Module) -> str | None:
        """In the forward of a module."""
        own = self._value(vars(module).get("forward"), module)
        return own or self._value(inspect.getattr_static(type(module), "forward", None), module)

    def _values(self, values: Iterable[Any], code: CodeType) -> str | None:
        for value in values:
            if told := _told(value):
                return _words(code, told)
            if issubclass(type(value), _CALLABLE) and (found := self._value(value)):  # isinstance would ask a proxy
                return found
        return None

    def _value(self, value: Any, owner: Any = None) -> str | None:
        """In what a name stands for: a function, a method, or a module."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, MethodType):
            value, owner = value.__func__, value.__self__
        if isinstance(value, functools.partial):
            return self._value(value.func)
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, nn.Module) and value is not owner:
            return self.module(value)
        if not isinstance(value, FunctionType) or _is_trusted(value.__code__):
            return None
        given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        given += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        code = value.__code__
        if id(code) in self._seen:
            return self._values((one for one in given if not isinstance(one, FunctionType)), code)
        return self._code(code, value.__globals__, owner) or self._values(given, code)

    def _code(self, code: CodeType, names: dict[str, Any], owner: Any) -> str | None:
        if id(code) in self._seen:
            return None
        self._seen[id(code)] = code
        value = imported = before = None
        for step in dis.get_instructions(code):
            name = step.opname
            if name == "IS_OP" and before != "LOAD_CONST" and not isinstance(value, _PLAIN):
                return _words(code, "`is`")
            if step.argval == "__class__" and (before == "__class__" or isinstance(value, type)):
                return _words(code, "the class of a class")
            before = "__class__" if step.argval == "__class__" else name
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = names.get(step.argval, getattr(builtins, step.argval, None))
            elif name == "IMPORT_NAME":
                value = imported = sys.modules.get(step.argval)
            elif name in ("IMPORT_FROM", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                if step.argval in _STATISTICS:
                    return _words(code, step.argval)
                value = imported if name == "IMPORT_FROM" else value
                known = isinstance(value, (ModuleType, type))
                value = _attribute(value if known else owner, step.argval)
            else:
                value = None
            found = _told(value)
            text = _words(code, found) if found else self._value(value, owner)
            if text:
                return text
        nested = [self._code(one, names, owner) for one in code.co_consts if isinstance(one, CodeType)]
        return next(filter(None, nested), None)


def _told(value: Any) -> str | None:
    """How an object tells, in words; None if it does not by itself."""
    if issubclass(type(value), type) and issubclass(value, autograd.Function):
        return "a torch.autograd.Function"
    if type(value) is MethodType and getattr(value.__func__, "__code__", None) is _APPLY:
        return "a torch.autograd.Function"
    return _TELLING.get(id(value))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _attribute(of: Any, name: str) -> Any:
    """An attribute, or a module within a module, without running any code of it."""
    if of is None:
        return None
    modules = vars(of).get("_modules", {}) if isinstance(of, nn.Module) else {}
    return modules[name] if name in modules else inspect.getattr_static(of, name, None)


def _words(code: CodeType, what: str) -> str:
    return f"{code.co_qualname.rpartition('<locals>.')[2]} uses {what}, and could tell that the result waits"


class Watch:
    """While it is entered, looks at all code that runs in this thread. `found` says of the first how it could tell."""

    def __init__(self) -> None:
        self.found: str | None = None
        self._scan = _Scan()

    def __enter__(self) -> Watch:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def passed(self, module: nn.Module) -> None:
        """Looks at a module that is not run, though it gets what stands for a tensor."""
        self.found = self.found or self._scan.module(module)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code is _APPLY:
            self.found = self.found or _words(frame.f_code, "a torch.autograd.Function")
        if self.found or _is_trusted(frame.f_code):
            return None
        self.found = self._scan.frame(frame)
        frame.f_trace_lines = False
        return self._raised

    def _raised(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "exception" and not self.found and not issubclass(argument[0], _ENDS):
            self.found = _words(frame.f_code, f"an error, {argument[0].__name__}")
        return self._raised
