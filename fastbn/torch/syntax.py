"""What do the expressions and statements of Python do with what waits?"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any

from torch import Tensor, nn

from .follow import ABSENT, ODD, Frame, Reader, is_public
from .proof import MISSING, NONE, Facts, Proof, Value, joined, merged, mixed
from .source import Function, calls_of, contains, place_of, stored

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_ROUNDS = 20
"""As often a loop is followed, until nothing new is learned."""


def prove(owner: nn.Module, norms: Iterable[nn.Module]) -> tuple[dict[nn.Module, Proof], dict[nn.Module, str]]:
    """The proofs that results of these norms may wait in the forward of a module, and why there is none of others."""
    norms = list(norms)
    proofs: dict[nn.Module, Proof] = {}
    reasons: dict[nn.Module, str] = {}
    for plain in (False, True):
        if len(proofs) < len(norms):
            reader = _Syntax(norms, plain)
            try:
                reader.start(owner)
            except Exception as error:  # whatever a model's objects do when they are looked at
                reader.refuse(norms, f"cannot be followed: {type(error).__name__}: {error}")
            for norm in norms:
                if norm not in reader.reasons and reader.paths[norm]:
                    proofs.setdefault(norm, reader.proof(norm))
                reasons[norm] = reader.reasons.get(norm) or "no call of it can be followed" + (
                    f" past {reader.skipped[-1]}" if reader.skipped else ""
                )
    return proofs, {norm: reason for norm, reason in reasons.items() if norm not in proofs}


class _Syntax(Reader):
    """Follows functions by their syntax. Methods are named after kinds of expressions, and, with do_, of statements."""

    def body(self, node: Function, frame: Frame) -> None:
        if isinstance(node, ast.Lambda):
            frame.results.append(self.value(node.body))
            return
        self.block(node.body)
        if frame.names is not None or not frame.results:
            frame.results.append(Value(known=None, plain=self.whole))

    # Expressions

    def value(self, node: ast.expr) -> Value:
        """The value of an expression that is not a part of another."""
        mark = len(self.held)
        value = self.read(node)
        del self.held[mark:]
        return value

    def read(self, node: ast.expr) -> Value:
        """The value of an expression. It is held until the expression around it is over."""
        mark = len(self.held)
        read: Callable[[Any], Value] = getattr(self, f"_{type(node).__name__.lower()}", self._other)
        value = read(node)
        del self.held[mark:]
        self.held.append(value)
        return value

    def reads(self, nodes: Iterable[ast.expr]) -> list[Value]:
        """The values of parts of an expression, as far as they are known once the last is read."""
        mark = len(self.held)
        for node in nodes:
            self.read(node)
        return self.held[mark:]

    def _other(self, node: ast.expr) -> Value:
        """An expression that is not followed (lambda, comprehension, await, ...): nothing may wait while it runs."""
        self.unread(node)
        return self.unknown(f"`{ast.unparse(node)}`")

    def _constant(self, node: ast.Constant) -> Value:
        return Value(plain=self.whole, known=node.value, fresh=True)

    def _name(self, node: ast.Name) -> Value:
        frame = self.frames[-1]
        code, names = frame.code, frame.function.__globals__
        if node.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            return (frame.names or {}).get(node.id, Value())
        if node.id in names:
            return self.of_mapping(names, node.id, NONE)
        builtins: dict[str, Any] = getattr(frame.function, "__builtins__")  # noqa: B009  # unknown to mypy
        return self.of_mapping(builtins, node.id, self.item(names, node.id)) if node.id in builtins else Value()

    def _attribute(self, node: ast.Attribute) -> Value:
        of, what = self.read(node.value), ast.unparse(node)
        if of.known is not MISSING and not isinstance(of.known, (str, int, float, NoneType)):
            found = self.found(of, node.attr)
            return self.unknown(what) if found is None else Value() if found.known is ABSENT else found
        is_method = callable(getattr(Tensor, node.attr, None))
        if of.waits and (is_method or node.attr in ODD or not is_public(node.attr)):
            self.refuse(of.waits, f"asks for {what}")
        y = self.touch([of], what)
        return Value() if is_method or node.attr in ODD or not is_public(node.attr) else y

    def _call(self, node: ast.Call) -> Value:
        what, code = f"{ast.unparse(node.func)}()", self.frames[-1].code
        mark, is_method = len(self.held), False
        if isinstance(node.func, ast.Attribute):
            receiver = self.read(node.func.value)
            is_method = receiver.known is MISSING or isinstance(receiver.known, (str, int, float, NoneType))
            if not is_method:
                self.held[mark] = self.found(receiver, node.func.attr) or Value()
        else:
            self.read(node.func)
        self.reads([*node.args, *(one.value for one in node.keywords)])
        callee, *args = self.held[mark:]
        named = {one.arg or "**": value for one, value in zip(node.keywords, args[len(node.args) :], strict=True)}
        args = args[: len(node.args)]
        if "**" in named or any(isinstance(one, ast.Starred) for one in node.args):
            return self.unknown(what, [callee, *args, *named.values()])
        if is_method and isinstance(node.func, ast.Attribute):
            return self.method(callee, node.func.attr, args, named, what)
        place: Any = place_of(code, node)
        self.path.append(place if place in calls_of(code).values() else None)
        y = self.call(callee, args, named, what)
        self.path.pop()
        return y

    def _starred(self, node: ast.Starred) -> Value:
        return self.read(node.value)

    def _binop(self, node: ast.BinOp) -> Value:
        return self.operation(node.op, self.reads([node.left, node.right]))

    def operation(self, op: ast.operator, values: list[Value]) -> Value:
        """The result of an operator. A sum may wait."""
        y = self.touch(values, f"an operator, {type(op).__name__},")
        items = any(value.items for value in values)
        y = y._replace(items=items, fresh=True)
        return self.sum(y, values) if isinstance(op, ast.Add) else y

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            return self.truth(node)[2]
        return self.touch([self.read(node.operand)], "an operator")

    def _boolop(self, node: ast.BoolOp) -> Value:
        values = self.reads(node.values)
        self.touch(values[:-1], "a truth value")
        return joined(*values)

    def _compare(self, node: ast.Compare) -> Value:
        return self.truth(node)[2]

    def _ifexp(self, node: ast.IfExp) -> Value:
        truth, facts, _ = self.truth(node.test)
        if truth is None:
            return joined(self.read(node.body), self.read(node.orelse))
        self.use(facts)
        self.unread(node.orelse if truth else node.body)
        return self.read(node.body if truth else node.orelse).resting(facts)

    def unread(self, *nodes: ast.expr) -> None:
        """Expressions that are not read: what they would assign is not known."""
        for name in stored(list(nodes)):
            self.frames[-1].set(name, Value())

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        value, frame = self.read(node.value), self.frames[-1]
        self.bind(node.target, joined(value, (frame.names or {}).get(node.target.id, value)))
        return value

    def _list(self, node: ast.List | ast.Tuple) -> Value:
        values = self.reads(node.elts)
        for value in values:
            self.refuse(value.waits, "puts the result into a list or tuple")
        return Value(plain=mixed(values) if values else self.whole, items=True)

    _tuple = _list

    def _dict(self, node: ast.Dict) -> Value:
        values = self.reads(one for one in (*node.keys, *node.values) if one is not None)
        for value in values:
            self.refuse(value.waits, "puts the result into a dict")
        self.touch(values, "a dict")
        return Value()

    def _joinedstr(self, node: ast.JoinedStr) -> Value:
        parts = [one for one in node.values if isinstance(one, ast.FormattedValue)]
        values = [self.read(one.value) for one in parts]
        values += [self.read(one.format_spec) for one in parts if one.format_spec is not None]
        for value in values:
            self.refuse(value.waits, "formats the result")
        return self.touch(values, "a format")

    def _subscript(self, node: ast.Subscript) -> Value:
        of, index = self.reads([node.value, node.slice])
        cls, key = type(of.known), index.known
        if cls in _CONTAINERS and type(key) in (int, str):
            modules: Any = of.known._modules
            facts = of.facts | self.order(of.known) | self.attribute(of.known, "__class__")
            facts |= self.attribute(cls, "__getitem__")
            chosen = modules.get(key) if cls is nn.ModuleDict else dict(enumerate(modules.values())).get(key)
            return Value(known=chosen, facts=facts) if chosen is not None else Value()
        self.refuse(index.waits, "takes the result for an index")
        y = self.touch([of, index], "an index")
        return Value() if of.items else y

    def _slice(self, node: ast.Slice) -> Value:
        values = self.reads(one for one in (node.lower, node.upper, node.step) if one is not None)
        for value in values:
            self.refuse(value.waits, "takes the result for an index")
        return Value(plain=mixed(values) if values else self.whole)

    def truth(self, node: ast.expr) -> tuple[bool | None, Facts, Value]:
        """Whether a condition is true, if that is known, the facts on which this rests, and its value."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            truth, facts, _ = self.truth(node.operand)
            return None if truth is None else not truth, facts, Value(plain=self.whole)
        if isinstance(node, ast.BoolOp):
            return self.truth_of_all(node)
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        value = self.read(node)
        known = value.known
        if known is None or type(known) is bool:
            return bool(known), value.facts, value
        if issubclass(type(known), nn.Module) and not any(hasattr(known, name) for name in ("__bool__", "__len__")):
            cls = type(known)
            return True, value.facts | self.attribute(cls, "__bool__") | self.attribute(cls, "__len__"), value
        self.touch([value], "a truth value")
        return None, NONE, value

    def truth_of_all(self, node: ast.BoolOp) -> tuple[bool | None, Facts, Value]:
        decisive = isinstance(node.op, ast.Or)
        all_known, rests = True, NONE
        for i, one in enumerate(node.values):
            truth, facts, _ = self.truth(one)
            if truth is decisive:
                self.unread(*node.values[i + 1 :])
                return decisive, facts if all_known else rests | facts, Value(plain=self.whole)
            all_known, rests = all_known and truth is not None, rests | facts
        return (not decisive if all_known else None), rests, Value(plain=self.whole)

    def comparison(self, node: ast.Compare) -> tuple[bool | None, Facts, Value]:
        values = self.reads([node.left, *node.comparators])
        result = Value(plain=self.whole)
        if len(values) == 2 and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            one, other = values
            if other.known is not None:
                self.refuse(one.waits | other.waits, "compares the result by its identity")
            elif not one.waits and one.known is not MISSING:
                return (one.known is None) is isinstance(node.ops[0], ast.Is), one.facts, result
            return None, NONE, result
        if any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops):
            for value in values:
                self.refuse(value.waits, "compares the result by its identity, or looks it up")
        return None, NONE, self.touch(values, "a comparison")

    # Statements

    def block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if self.frames[-1].names is None:
                return
            do: Callable[[Any], None] = getattr(self, f"do_{type(statement).__name__.lower()}", self.opaque)
            do(statement)

    def do_expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def do_pass(self, node: ast.Pass) -> None:
        """Nothing happens."""

    def do_assign(self, node: ast.Assign) -> None:
        mark = len(self.held)
        if isinstance(node.value, ast.Tuple) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple):
            targets, values = node.targets[0].elts, node.value.elts
            if len(targets) == len(values) and not any(isinstance(one, ast.Starred) for one in (*targets, *values)):
                for target, value in zip(targets, self.reads(values), strict=True):
                    self.bind(target, value)
                del self.held[mark:]
                return
        value = self.read(node.value)
        for target in node.targets:
            self.bind(target, value)
        del self.held[mark:]

    def do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.bind(node.target, self.value(node.value))

    def do_augassign(self, node: ast.AugAssign) -> None:
        mark = len(self.held)
        if isinstance(node.target, ast.Name):
            values = self.reads([ast.Name(node.target.id, ast.Load()), node.value])
            self.modify(values[0], "an operator in place")
            self.bind(node.target, self.operation(node.op, values)._replace(fresh=values[0].fresh))
        else:
            self.bind(node.target, self.read(node.value))
        del self.held[mark:]

    def bind(self, target: ast.expr, value: Value) -> None:
        """Assigns to a target."""
        frame = self.frames[-1]
        if isinstance(target, ast.Name):
            frame.set(target.id, value)
            self.kept(frame, [target.id])
        elif isinstance(target, (ast.Tuple, ast.List)):
            y = self.touch([value], "an assignment to several names")
            for one in target.elts:
                self.bind(one, Value() if value.items or isinstance(one, ast.Starred) else y)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)
        else:
            self.unknown(f"an assignment to {ast.unparse(target)}", [value])

    def do_delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self.bind(target, Value())

    def do_return(self, node: ast.Return) -> None:
        frame = self.frames[-1]
        frame.results.append(Value(known=None, plain=self.whole) if node.value is None else self.value(node.value))
        frame.names = None

    def do_raise(self, node: ast.Raise) -> None:
        for one in (node.exc, node.cause):
            if one is not None:
                self.refuse(self.value(one).waits, "raises the result")
        self.frames[-1].names = None

    def do_assert(self, node: ast.Assert) -> None:
        self.do_if(ast.If(node.test, [], [] if node.msg is None else [ast.Expr(node.msg)]))

    def do_if(self, node: ast.If) -> None:
        frame, mark = self.frames[-1], len(self.held)
        truth, facts, _ = self.truth(node.test)
        del self.held[mark:]
        if truth is None or contains([node], ast.Break, ast.Continue):
            before = dict(frame.names or {})
            self.block(node.body)
            after, frame.names = frame.names, before
            self.block(node.orelse)
            frame.names = merged(after, frame.names)
            return
        self.use(facts)
        self.block(node.body if truth else node.orelse)
        self.rest(node, facts)

    def rest(self, node: ast.stmt, facts: Facts) -> None:
        """What a statement does rests on facts."""
        frame = self.frames[-1]
        for name in stored([node]).intersection(frame.names or {}):
            frame.set(name, (frame.names or {})[name].resting(facts))
        if contains([node], ast.Return):
            frame.rests |= facts

    def do_while(self, node: ast.While) -> None:
        self.loop(node, lambda: self.touch([self.value(node.test)], "a truth value"))

    def do_for(self, node: ast.For) -> None:
        mark = len(self.held)
        of = self.read(node.iter)
        if type(of.known) in _CONTAINERS[:2] and not node.orelse and not contains(node.body, ast.Break, ast.Continue):
            facts = of.facts | self.order(of.known) | self.attribute(of.known, "__class__")
            facts |= self.attribute(type(of.known), "__iter__")
            self.held[mark] = of._replace(facts=facts)
            self.rests.append(facts)
            for child in of.known._modules.values():
                if self.frames[-1].names is not None:
                    self.use(facts)
                    is_known = self.held[mark].known is not MISSING  # a loop goes on with what it began with
                    self.bind(node.target, Value(known=child, facts=facts) if is_known else Value())
                    self.block(node.body)
            self.rests.pop()
            self.use(facts)
            self.rest(node, facts)
        else:
            self.loop(node, lambda: self.bind(node.target, self.each(self.held[mark])))
        del self.held[mark:]

    def each(self, of: Value) -> Value:
        """What a loop over something gives."""
        y = self.touch([of], "a loop")
        return Value() if of.items else y

    def loop(self, node: ast.For | ast.While, enter: Callable[[], Any]) -> None:
        """Follows a loop until nothing new is learned."""
        frame = self.frames[-1]
        outer, frame.left = frame.left, []
        for _ in range(_ROUNDS):
            before = frame.names = dict(frame.names or {})
            frame.names = dict(before)
            enter()
            self.block(node.body)
            frame.names = merged(before, frame.names, *frame.left)
            after = frame.names or {}
            if after.keys() == before.keys() and all(value.same(before[name]) for name, value in after.items()):
                break
        else:
            self.refuse(self.live(), "loops")
        left, frame.left = frame.left, outer
        self.block(node.orelse)
        frame.names = merged(frame.names, *left)

    def do_break(self, node: ast.Break | ast.Continue) -> None:
        frame = self.frames[-1]
        frame.left.append(frame.names)
        frame.names = None

    do_continue = do_break

    def opaque(self, node: ast.stmt) -> None:
        """A statement that is not followed (with, try, match, def, import, ...): nothing may wait in it."""
        kind, frame = type(node).__name__.lower(), self.frames[-1]
        self.skipped.append(f"{kind} in {frame.code.co_qualname.rpartition('<locals>.')[2]}")
        self.unknown(f"a statement, {kind},")
        for name in stored([node]):
            frame.set(name, Value())
        for one in ast.walk(node):
            if isinstance(one, ast.Return):
                frame.results.append(Value())
            elif isinstance(one, (ast.Break, ast.Continue)):
                frame.left.append(dict(frame.names or {}))
