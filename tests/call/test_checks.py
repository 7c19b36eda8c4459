"""Is bad input refused with a message that helps, and with nothing modified?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest

import fastbn

Array = np.ndarray[Any, Any]
Arguments = dict[str, Any]
CHANNELS, SHAPE = 3, (4, 3, 5)
STRIDED = np.lib.stride_tricks.as_strided


class Bad(NamedTuple):
    """An argument's bad value, or a function that makes it from the good arguments; the message has all `words`."""

    argument: str
    value: Any
    error: type[Exception]
    words: tuple[str, ...]

    def __str__(self) -> str:
        if isinstance(self.value, np.ndarray):
            return f"{self.argument} {type(self.value).__name__} {self.value.dtype.name} {self.value.shape}"
        return f"{self.argument} {self.words[0] if callable(self.value) else repr(self.value)[:20]}"


def good(shape: tuple[int, ...] = SHAPE, **others: Any) -> Arguments:
    """Valid arguments of forward and infer, an array for each that may be one."""
    c = cases.call(shape)
    names = ("x", "gamma", "beta", "running_mean", "running_var", "residual")
    return {**{name: getattr(c, name) for name in names}, "out": np.zeros_like(c.x), **others}


def memory_of(values: Any) -> list[bytes]:
    """The bytes of all arrays among the values, and of the arrays that they are views of."""
    found = []
    for value in values:
        while isinstance(value, np.ndarray):
            if not value.dtype.hasobject:
                found.append(value.tobytes())
            value = value.base
    return found


def assert_refused(call: Callable[..., Any], arguments: Arguments, error: type[Exception], *words: str) -> None:
    """The call raises `error` with all words in its message, and changes no array."""
    before = memory_of(arguments.values())
    with pytest.raises(error) as caught:
        call(**arguments)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert memory_of(arguments.values()) == before, "an array was modified"


def zeros(shape: Any, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


def masked(shape: Any) -> Array:
    return np.ma.masked_array(zeros(shape))


FLOATS = ("float16", "bfloat16", "float32", "float64")

# Of x, gamma, beta and the options, alike in forward and infer.
COMMON = (
    Bad("x", zeros(SHAPE, np.int32), TypeError, ("int32", *FLOATS)),
    Bad("x", zeros(SHAPE, np.uint8), TypeError, ("uint8", *FLOATS)),
    Bad("x", zeros(SHAPE, bool), TypeError, ("bool", *FLOATS)),
    Bad("x", zeros(SHAPE, np.complex64), TypeError, ("complex64", *FLOATS)),
    Bad("x", zeros(SHAPE, object), TypeError, ("object", *FLOATS)),
    Bad("x", zeros(SHAPE, np.longdouble), TypeError, (np.dtype(np.longdouble).name, *FLOATS)),
    Bad("x", zeros(SHAPE, "V2"), TypeError, ("V2", *FLOATS)),
    Bad("x", zeros(SHAPE, "datetime64[s]"), TypeError, ("datetime64", *FLOATS)),
    Bad("x", zeros(SHAPE, [("a", np.float32)]), TypeError, ("<f4", *FLOATS)),
    Bad("x", [["a", "b"], ["c", "d"]], TypeError, ("U1", *FLOATS)),
    Bad("x", [[1, 2], [3, 4]], TypeError, ("int", *FLOATS)),
    Bad("x", [[1.0, 2.0], [3.0]], TypeError, ("list", "array")),
    Bad("x", None, TypeError, ("object", *FLOATS)),
    Bad("x", "x", TypeError, ("U1", *FLOATS)),
    Bad("x", masked(SHAPE), TypeError, ("masked",)),
    Bad("x", 1.0, ValueError, ("()", "2 dimensions")),
    Bad("x", zeros(3), ValueError, ("(3,)", "2 dimensions")),
    Bad("gamma", zeros(CHANNELS, int), TypeError, ("int64", "float")),
    Bad("gamma", zeros(CHANNELS, complex), TypeError, ("complex128", "float")),
    Bad("gamma", zeros(CHANNELS, object), TypeError, ("object", "float")),
    Bad("gamma", ["a", "b", "c"], TypeError, ("U1", "float")),
    Bad("gamma", masked(CHANNELS), TypeError, ("masked",)),
    Bad("gamma", 1.0, ValueError, ("()", "(3,)")),
    Bad("gamma", zeros(1), ValueError, ("(1,)", "(3,)")),
    Bad("gamma", zeros(4), ValueError, ("(4,)", "(3,)")),
    Bad("gamma", zeros((3, 1)), ValueError, ("(3, 1)", "(3,)")),
    Bad("beta", zeros(CHANNELS, int), TypeError, ("int64", "float")),
    Bad("beta", masked(CHANNELS), TypeError, ("masked",)),
    Bad("beta", zeros(5), ValueError, ("(5,)", "(3,)")),
    Bad("residual", zeros(SHAPE, np.float64), TypeError, ("float64", "float32")),
    Bad("residual", zeros(SHAPE, int), TypeError, ("int64", "float32")),
    Bad("residual", masked(SHAPE), TypeError, ("masked",)),
    Bad("residual", zeros((4, 3, 1)), ValueError, ("(4, 3, 1)", str(SHAPE))),
    Bad("residual", zeros((4, 5, 3)), ValueError, ("(4, 5, 3)", str(SHAPE))),
    Bad("eps", -1e-9, ValueError, ("-1e-09", "0")),
    Bad("eps", float("nan"), ValueError, ("nan", "finite")),
    Bad("eps", float("inf"), ValueError, ("inf", "finite")),
    Bad("eps", 10**400, ValueError, ("finite",)),
    Bad("eps", "1e-5", TypeError, ("'1e-5'", "number")),
    Bad("eps", None, TypeError, ("None", "number")),
    Bad("eps", True, TypeError, ("True", "number")),
    Bad("eps", 1j, TypeError, ("1j", "number")),
    Bad("eps", zeros(1), TypeError, ("number",)),
    Bad("axis", 3, ValueError, ("3", "-3 to 2")),
    Bad("axis", -4, ValueError, ("-4", "-3 to 2")),
    Bad("axis", 10**30, ValueError, ("-3 to 2",)),
    Bad("axis", 1.0, TypeError, ("1.0", "integer")),
    Bad("axis", True, TypeError, ("True", "integer")),
    Bad("axis", np.True_, TypeError, ("True", "integer")),
    Bad("axis", None, TypeError, ("None", "integer")),
    Bad("axis", (1,), TypeError, ("(1,)", "integer")),
    Bad("activation", "gelu", ValueError, ("'gelu'", "None", "'relu'")),
    Bad("activation", "ReLU", ValueError, ("'ReLU'", "'relu'")),
    Bad("activation", "", ValueError, ("''", "'relu'")),
    Bad("activation", 1, TypeError, ("1", "'relu'")),
    Bad("activation", True, TypeError, ("True", "'relu'")),
    Bad("activation", ["relu"], TypeError, ("['relu']", "'relu'")),
    Bad("activation", max, TypeError, ("max", "'relu'")),
    Bad("activation", ("relu", 0.1), ValueError, ("('relu', 0.1)", "leaky_relu")),
    Bad("activation", ("leaky_relu",), TypeError, ("('leaky_relu',)", "slope")),
    Bad("activation", ("leaky_relu", 0.1, 2), TypeError, ("('leaky_relu', 0.1, 2)", "slope")),
    Bad("activation", (0.1, "leaky_relu"), TypeError, ("(0.1, 'leaky_relu')", "slope")),
    Bad("activation", ("leaky_relu", "0.1"), TypeError, ("slope", "'0.1'", "number")),
    Bad("activation", ("leaky_relu", None), TypeError, ("slope", "None", "number")),
    Bad("activation", ("leaky_relu", True), TypeError, ("slope", "True", "number")),
    Bad("activation", ("leaky_relu", float("nan")), ValueError, ("slope", "nan", "finite")),
    Bad("activation", ("leaky_relu", float("-inf")), ValueError, ("slope", "-inf", "finite")),
    Bad("backend", "cuda", ValueError, ("'cuda'", "'c'", "'numba'", "'numpy'")),
    Bad("backend", "C", ValueError, ("'C'", "'numpy'")),
    Bad("backend", 1, TypeError, ("1", "'numpy'")),
    Bad("backend", ["c"], TypeError, ("['c']", "'numpy'")),
    Bad("running_mean", None, ValueError, ("None", "running_var", "both")),
    Bad("running_var", None, ValueError, ("None", "running_mean", "both")),
    Bad("running_mean", [0.0, 0.0, 0.0], TypeError, ("list", "NumPy array")),
    Bad("running_mean", zeros(CHANNELS, np.longdouble), TypeError, (np.dtype(np.longdouble).name, *FLOATS)),
    Bad("running_mean", zeros(CHANNELS, int), TypeError, ("int64", "float32")),
    Bad("running_mean", masked(CHANNELS), TypeError, ("masked",)),
    Bad("running_mean", zeros(4), ValueError, ("(4,)", "(3,)")),
    Bad("running_var", zeros(CHANNELS, np.complex64), TypeError, ("complex64", *FLOATS)),
    Bad("running_var", zeros((1, 3)), ValueError, ("(1, 3)", "(3,)")),
)

# Of `out`, alike in forward, infer and backward.
OUT = (
    Bad("out", [[0.0]], TypeError, ("list", str(SHAPE))),
    Bad("out", zeros(SHAPE, np.float64), TypeError, ("float64", "float32")),
    Bad("out", zeros(SHAPE, int), TypeError, ("int64", "float32")),
    Bad("out", masked(SHAPE), TypeError, ("masked",)),
    Bad("out", zeros((4, 3)), ValueError, ("(4, 3)", str(SHAPE))),
    Bad("out", zeros((1, *SHAPE)), ValueError, ("(1, 4, 3, 5)", str(SHAPE))),
    Bad("out", read_only(zeros(SHAPE)), ValueError, ("read-only",)),
    Bad("out", np.broadcast_to(zeros(5), SHAPE), ValueError, ("read-only",)),
    Bad("out", STRIDED(zeros(20), SHAPE, (20, 0, 4)), ValueError, ("overlap",)),
    Bad("out", STRIDED(zeros(50), SHAPE, (40, 4, 4)), ValueError, ("overlap",)),
)


def over(name: str, shift: int) -> Callable[[Arguments], Array]:
    """An `out` that shares memory with another argument, which it moves into a larger buffer."""

    def make(arguments: Arguments) -> Array:
        given = arguments[name]
        buffer = np.zeros(given.size + abs(shift) + arguments["x"].size, given.dtype)
        arguments[name] = buffer[: given.size].reshape(given.shape)
        arguments[name][...] = given
        return buffer[shift : shift + arguments["x"].size].reshape(arguments["x"].shape)

    return make


OVERLAP_WITH_INPUT = (
    *(
        Bad("out", over(name, shift), ValueError, (f"{name}", "shared"))
        for name in ("x", "residual")
        for shift in (1, 17, CHANNELS * 5)
    ),
    *(Bad("out", over(name, 0), ValueError, (f"{name}", "shared")) for name in ("residual", "gamma", "beta")),
    *(Bad("out", over(name, 1), ValueError, (f"{name}", "shared")) for name in ("running_mean", "running_var")),
    Bad("out", lambda arguments: arguments["x"][::-1], ValueError, ("x", "shared")),
    Bad("out", lambda arguments: arguments["x"][..., ::-1], ValueError, ("x", "shared")),
)

# Of forward alone.
FORWARD = (
    Bad("mask", zeros((4, 5)), TypeError, ("float32", "bool")),
    Bad("mask", zeros((4, 5), int), TypeError, ("int64", "bool")),
    Bad("mask", "yes", TypeError, ("U3", "bool")),
    Bad("mask", masked((4, 5)), TypeError, ("masked",)),
    Bad("mask", zeros(SHAPE, bool), ValueError, (str(SHAPE), "(4, 5)")),
    Bad("mask", zeros((4, 3), bool), ValueError, ("(4, 3)", "(4, 5)")),
    Bad("mask", zeros(4, bool), ValueError, ("(4,)", "(4, 5)")),
    Bad("mask", zeros((1, 4, 5), bool), ValueError, ("(1, 4, 5)", "(4, 5)")),
    Bad("mask", zeros((4, 5), bool), ValueError, ("0", "2 or more")),
    Bad("mask", np.eye(4, 5, dtype=bool) & (np.arange(5) < 1), ValueError, ("1", "2 or more")),
    Bad("mask", False, ValueError, ("0", "2 or more")),
    Bad("training", 1, TypeError, ("1", "True", "False")),
    Bad("training", None, TypeError, ("None", "True", "False")),
    Bad("training", "yes", TypeError, ("'yes'", "True", "False")),
    Bad("momentum", float("nan"), ValueError, ("nan", "0 to 1")),
    Bad("momentum", -0.1, ValueError, ("-0.1", "0 to 1")),
    Bad("momentum", 1.1, ValueError, ("1.1", "0 to 1")),
    Bad("momentum", float("inf"), ValueError, ("inf", "0 to 1")),
    Bad("momentum", "0.1", TypeError, ("'0.1'", "number")),
    Bad("momentum", None, TypeError, ("None", "number")),
    Bad("momentum", True, TypeError, ("True", "number")),
    Bad("running_mean", read_only(zeros(CHANNELS)), ValueError, ("read-only", "writable")),
    Bad("running_var", read_only(zeros(CHANNELS)), ValueError, ("read-only", "writable")),
    Bad("running_mean", STRIDED(zeros(1), (CHANNELS,), (0,)), ValueError, ("strides", "overlap")),
    Bad("running_var", STRIDED(zeros(CHANNELS), (CHANNELS,), (2,)), ValueError, ("strides", "overlap")),
    Bad("running_var", lambda arguments: arguments["running_mean"], ValueError, ("running_mean", "shared")),
    Bad("running_mean", lambda arguments: arguments["x"][0, :, 0], ValueError, ("x", "shared")),
    Bad("running_var", lambda arguments: arguments["residual"][0, :, 0], ValueError, ("residual", "shared")),
    Bad("running_mean", lambda arguments: arguments["gamma"], ValueError, ("gamma", "shared")),
    Bad("running_var", lambda arguments: arguments["beta"], ValueError, ("beta", "shared")),
)


def _refuse(call: Callable[..., Any], bad: Bad, arguments: Arguments) -> None:
    arguments[bad.argument] = bad.value(arguments) if callable(bad.value) and bad.value is not max else bad.value
    assert_refused(call, arguments, bad.error, bad.argument, *bad.words)


@pytest.mark.parametrize("bad", (*COMMON, *OUT, *OVERLAP_WITH_INPUT, *FORWARD), ids=str)
def test_forward(bad: Bad) -> None:
    _refuse(fastbn.forward, bad, good())


@pytest.mark.parametrize("bad", (*COMMON, *OUT, *OVERLAP_WITH_INPUT), ids=str)
def test_infer(bad: Bad) -> None:
    _refuse(fastbn.infer, bad, good())


BACKWARD = (
    Bad("dy", zeros(SHAPE, np.float64), TypeError, ("float64", "float32")),
    Bad("dy", zeros(SHAPE, int), TypeError, ("int64", "float32")),
    Bad("dy", "dy", TypeError, ("U2", "float32")),
    Bad("dy", None, TypeError, ("object", "float32")),
    Bad("dy", masked(SHAPE), TypeError, ("masked",)),
    Bad("dy", 1.0, TypeError, ("float64", "float32")),
    Bad("dy", zeros((4, 3)), ValueError, ("(4, 3)", str(SHAPE))),
    Bad("dy", zeros((4, 5, 3)), ValueError, ("(4, 5, 3)", str(SHAPE))),
    Bad("cache", None, TypeError, ("NoneType", "forward")),
    Bad("cache", (1, 2), TypeError, ("tuple", "forward")),
    Bad("cache", fastbn.forward(zeros((2, 1))), TypeError, ("Forward", "cache", "forward")),
    Bad("backend", "cuda", ValueError, ("'cuda'", "'numpy'")),
    *OUT,
    Bad("out", lambda arguments: arguments["dy"].view(">f4"), ValueError, ("dy", "shared", "dy itself")),
    Bad("out", lambda arguments: arguments["dy"][::-1], ValueError, ("dy", "shared")),
    Bad("out", lambda arguments: arguments["x"], ValueError, ("x", "shared")),
    Bad("out", lambda arguments: arguments["residual"], ValueError, ("residual", "shared")),
)


@pytest.mark.parametrize("bad", BACKWARD, ids=str)
def test_backward(bad: Bad) -> None:
    c = cases.call(SHAPE)
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="relu")
    wanted = tuple(fastbn.backward(c.dy, cache))

    def backward(x: Array, residual: Array, **arguments: Any) -> Any:
        return fastbn.backward(**arguments)

    _refuse(backward, bad, {"x": c.x, "residual": c.residual, "dy": c.dy, "cache": cache, "out": np.zeros_like(c.x)})
    cases.assert_same_bits(tuple(fastbn.backward(c.dy, cache)), wanted)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (0, 3), (4, 3, 0), (0, 3, 4)], ids=str)
def test_too_few_values_to_train(kernel: cases.Kernel, shape: tuple[int, ...]) -> None:
    words = ("x", str(shape), "1 value " if shape[0] == 1 else "0 values ", "2 or more")
    assert_refused(fastbn.forward, good(shape, out=None), ValueError, *words)


def test_statistics_that_must_be_given() -> None:
    for given in ({}, {"gamma": zeros(CHANNELS)}):
        nothing = {"running_mean": None, "running_var": None}
        assert_refused(
            fastbn.forward, {"x": zeros(SHAPE), "training": False, **given}, ValueError, "running_mean", "running_var"
        )
        arguments = {"x": zeros(SHAPE), "gamma": None, "beta": None, **given, **nothing}
        assert_refused(fastbn.infer, arguments, ValueError, "running_mean", "running_var")


def test_interleaved_views_do_not_overlap() -> None:
    """However they are cropped and stepped."""
    buffer = zeros(2 * 4 * 3 * 5 * 8)
    x, out = (buffer.reshape(4, 3, 5, 8, 2)[..., 1:7:2, i] for i in range(2))
    x[...] = cases.call(x.shape).x
    wanted = fastbn.forward(x).y
    assert fastbn.forward(x, out=out).y is out
    assert np.array_equal(out, wanted)


def test_frozen_statistics_may_be_read_only_and_shared() -> None:
    arguments = good(training=False)
    for name in ("running_mean", "running_var"):
        arguments[name] = read_only(arguments[name])
    fastbn.forward(**arguments)
    shared = np.ones(CHANNELS, np.float32)
    fastbn.infer(arguments["x"], shared, shared, shared, shared)
    fastbn.forward(arguments["x"], shared, shared, shared, shared, training=False)


def test_message_stays_short() -> None:
    """It tells of an array's dtype and shape, not of its million values."""
    large = zeros((1000, 1000), int)
    for arguments in ({"x": large}, {"x": zeros((2, 3)), "gamma": large}, {"x": zeros((2, 3)), "eps": large}):
        with pytest.raises(TypeError) as caught:
            fastbn.forward(**arguments)
        assert len(str(caught.value)) < 400
