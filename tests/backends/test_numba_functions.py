"""Do the functions for jitted code give what fastbn gives, to the bit, and refuse what it refuses?"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn

numba = pytest.importorskip("numba")
from numba.core.errors import TypingError  # noqa: E402

import fastbn.numba as fbn  # noqa: E402

Array = np.ndarray[Any, Any]
jit: Any = numba.njit(nogil=True)


# The functions are compiled for each combination of types, which takes seconds. Tests give all arguments, of few types,
# from plain Python, which compiles nothing more. Those that are jitted have other types.


def infer(x, gamma, beta, mean, var, eps, axis, activation, residual, out, threads):
    return fbn.infer(x, gamma, beta, mean, var, eps, axis, activation, residual, out, threads)


def train(x, dy, gamma, beta, mean, var, training, momentum, eps, axis, activation, residual, out, threads):
    y, cache = fbn.forward(x, gamma, beta, mean, var, training, momentum, eps, axis, activation, residual, out, threads)
    return y, cache, fbn.backward(dy, cache, np.empty_like(x), threads)


@jit
def frozen(x, dy, gamma, beta, mean, var):
    y, cache = fbn.forward(x, gamma, beta, mean, var, training=False, activation="relu6")
    return y, fbn.backward(dy, cache)


@jit
def plain(x, dy):
    y, cache = fbn.forward(x, axis=-1)
    return y, fbn.backward(dy, cache)


def fastbn_c(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with fastbn.use_num_threads(1):
        return function(*arguments, backend="c", **named)


def step(
    x: Array, arrays: Any, *, dy: Any = None, training: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    activation: Any = "relu", residual: Any = None, out: Any = None, threads: int = 1,
) -> Any:  # fmt: skip
    """`train`, with defaults that have the types of what is given."""
    dy, out = x if dy is None else dy, np.empty_like(x) if out is None else out
    return train(x, dy, *arrays, training, momentum, eps, 1, activation, residual, out, threads)


def cache_of(c: cases.Call) -> Any:
    """That of a training step; of three dimensions with a residual."""
    return step(c.x, c[3:], residual=c.residual if c.x.ndim == 3 else None)[1]


CALLS: list[tuple[tuple[int, ...], int, Any, bool, int]] = [
    ((6, 5), 1, "relu", False, 1), ((40, 17), -1, "leaky_relu", False, 2), ((4, 3, 7), 1, None, True, 1),
    ((4, 3, 7), 1, "silu", True, 1), ((4, 3, 5), -1, "hardswish", True, 1), ((8, 1, 6), 1, "relu6", True, 2),
    ((16, 12, 1023), 1, "sigmoid", True, 3), ((2500, 40, 1), 1, "silu", True, 2),
    ((4, 3, 7), 1, ("leaky_relu", -2.0), True, 1), ((4, 5, 6), -2, ("leaky_relu", 0.3), True, 1),
]  # fmt: skip
"""Shape, axis, activation, whether with a residual, threads."""


def calls(dtype: str) -> list[Any]:
    """Those; of float64 the ones that name an activation and add a residual: what else is compiled sees no dtype."""
    return [one for one in CALLS if dtype == "float32" or (isinstance(one[2], str) and one[3])]


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_infer(dtype: str) -> None:
    """Into out, which may be x."""
    for shape, axis, activation, residual, threads in calls(dtype):
        c = cases.call(shape, dtype, axis)
        added = c.residual if residual else None
        parameters = c.gamma, c.beta, c.running_mean, c.running_var
        wanted = fastbn_c(fastbn.infer, c.x, *parameters, eps=1e-3, axis=axis, activation=activation, residual=added)
        out = np.empty_like(c.x)
        y = infer(c.x, *parameters, 1e-3, axis, activation, added, out, threads)
        assert y.ctypes.data == out.ctypes.data
        cases.assert_same_bits(y, wanted, f"{shape} {activation}")
        infer(c.x, *parameters, 1e-3, axis, activation, added, c.x, threads)
        cases.assert_same_bits(c.x, wanted, f"{shape} {activation} in place")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_training(dtype: str) -> None:
    for (shape, axis, activation, residual, threads), training in product(calls(dtype), (True, False)):
        c = cases.call(shape, dtype, axis)
        added = c.residual if residual else None
        mean, var = c.running_mean.copy(), c.running_var.copy()
        wanted, cache = fastbn_c(
            fastbn.forward, c.x, c.gamma, c.beta, c.running_mean, c.running_var, training=training, momentum=0.3,
            eps=1e-3, axis=axis, activation=activation, residual=added,
        )  # fmt: skip
        out = np.empty_like(c.x)
        y, made, got = train(
            c.x, c.dy, c.gamma, c.beta, mean, var, training, 0.3, 1e-3, axis, activation, added, out, threads
        )
        assert y.ctypes.data == out.ctypes.data
        gradients = fastbn_c(fastbn.backward, c.dy, cache)
        where = f"{shape} {activation} {training}"
        cases.assert_same_bits((y, mean, var), (wanted, c.running_mean, c.running_var), where)
        cases.assert_same_bits(made.saved, cache._parts.saved, where)
        cases.assert_same_bits(tuple(got), (*gradients, gradients.dresidual), where)


def test_frozen() -> None:
    """Which is known when it is compiled."""
    c = cases.call((6, 5, 4))
    arrays = c.gamma, c.beta, c.running_mean, c.running_var
    before = tuple(array.copy() for array in arrays if array is not None)
    y, got = frozen(c.x, c.dy, *arrays)
    cases.assert_same_bits(arrays, before)
    wanted, cache = fastbn_c(fastbn.forward, c.x, *arrays, training=False, activation="relu6")
    gradients = fastbn_c(fastbn.backward, c.dy, cache)
    cases.assert_same_bits((y, *got), (wanted, *gradients, None))


def test_without_parameters() -> None:
    """The gradients of ones and zeros are there nevertheless."""
    c = cases.call((6, 5))
    y, got = plain(c.x, c.dy)
    wanted, cache = fastbn_c(fastbn.forward, c.x, np.ones(5, np.float32), np.zeros(5, np.float32))
    cases.assert_same_bits((y, *got[:3]), (wanted, *fastbn_c(fastbn.backward, c.dy, cache)))
    assert got.dresidual is None


def test_no_values() -> None:
    c = cases.call((3, 5))
    x, residual, out = np.empty((3, 0, 5, 1), np.float32)
    y = infer(x, c.gamma, c.beta, c.running_mean, c.running_var, 1e-5, 1, "relu", residual, out, 1)
    assert y.shape == (0, 5, 1)


# Bad input -----------------------------------------------------------------------------------------------------------


BAD: list[tuple[str, Any]] = [
    ("gamma", np.ones(4, np.float32)), ("beta", np.ones(6, np.float32)), ("mean", np.ones(0, np.float32)),
    ("var", np.ones(4, np.float32)), ("residual", np.ones((5, 6, 1), np.float32)),
    ("out", np.ones((6, 4, 1), np.float32)), ("axis", 3), ("axis", -4), ("activation", "tanh"),
    ("activation", ("relu", 0.1)), ("activation", ("leaky_relu", np.nan)), ("eps", -1.0), ("eps", np.nan),
    ("threads", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: getattr(value, "shape", value))
def test_wrong_values(name: str, value: Any) -> None:
    """A ValueError that names the argument; nothing is changed."""
    c = cases.call((6, 5, 1))
    given: dict[str, Any] = {
        "gamma": c.gamma, "beta": c.beta, "mean": c.running_mean, "var": c.running_var, "eps": 1e-5,
        "axis": 1, "activation": "relu", "residual": c.residual, "out": np.zeros_like(c.x), "threads": 1,
    }  # fmt: skip
    before = c.x.tobytes(), c.running_mean.tobytes(), c.running_var.tobytes(), given["out"].tobytes()
    out, changed = given["out"], {**given, name: value}
    named = f"running_{name}" if name in ("mean", "var") else name
    for function, more in ((infer, {}), (train, {"dy": c.dy, "training": True, "momentum": 0.1})):
        with pytest.raises(ValueError, match=f"^{named}.*: got .*; allowed: "):
            function(c.x, **more, **changed)
        assert before == (c.x.tobytes(), c.running_mean.tobytes(), c.running_var.tobytes(), out.tobytes())


@jit
def _with_momentum(x, mean, var, momentum, training):
    return fbn.forward(x, None, None, mean, var, training, momentum).y


def test_wrong_training() -> None:
    c = cases.call((6, 5))
    for rows, momentum, named in ((6, -0.1, "momentum"), (6, 1.5, "momentum"), (6, np.nan, "momentum"), (1, 0.1, "x")):
        with pytest.raises(ValueError, match=f"^{named}: got"):
            step(c.x[:rows], c[3:], momentum=momentum)
    with pytest.raises(ValueError, match=r"^running_mean, running_var: got None.*training"):
        _with_momentum(c.x, None, None, 0.1, False)
    with pytest.raises(ValueError, match=r"^running_mean, running_var: got one"):
        _with_momentum(c.x, c.running_mean, None, 0.1, True)
    mean = c.running_mean.copy()
    mean.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _with_momentum(c.x, mean, c.running_var, 0.1, True)
    _with_momentum(c.x, mean, c.running_var, 0.1, False)


def test_running_statistics_have_memory_of_their_own() -> None:
    """Else a ValueError that names the argument, with nothing written."""
    rng = np.random.default_rng(0)
    memory = rng.standard_normal(90).astype(np.float32)
    x, residual, out = (memory[i : i + 20].reshape(4, 5, 1) for i in (0, 20, 40))
    gamma, beta, mean, var = (memory[i : i + 5] for i in (60, 65, 70, 75))
    given = {"x": x, "residual": residual, "out": out, "gamma": gamma, "beta": beta, "running_mean": mean}
    before = memory.tobytes()

    def call(mean: Array, var: Array) -> None:
        step(x, (gamma, beta, mean, var), residual=residual, out=out)

    for name in ("running_mean", "running_var"):
        for other, array in given.items():
            if other == name:
                continue
            for start in (0, array.size - 5):  # all of it, or a part
                shared = array.reshape(-1)[start : start + 5]
                statistics = (shared, var) if name == "running_mean" else (mean, shared)
                first = other if other in ("running_mean", "out") else name
                with pytest.raises(ValueError, match=rf"^{first}: got memory shared with .*; allowed: an array of its"):
                    call(*statistics)
                assert memory.tobytes() == before, f"{name} in {other}"
    with pytest.raises(ValueError, match=r"^running_mean: got memory shared with running_var"):
        call(mean, memory[72:77])
    call(mean, var)
    fbn.forward(x, None, None, mean, mean, training=False)  # which are only read


@pytest.mark.parametrize("threads", [-1, 0, 1025, 2**40])
def test_threads_beyond_reason(threads: int) -> None:
    c = cases.call((6, 5))
    arrays, out = (c.gamma, c.beta, c.running_mean, c.running_var), np.empty_like(c.x)
    cache = cache_of(c)
    for call in (
        lambda: infer(c.x, *arrays, 1e-5, 1, "relu", None, out, threads),
        lambda: step(c.x, arrays, threads=threads),
        lambda: fbn.backward(c.dy, cache, out, threads),
    ):
        before = c.running_mean.tobytes()
        with pytest.raises(ValueError, match=rf"^threads: got {threads}; allowed: 1 to 1024"):
            call()
        assert c.running_mean.tobytes() == before


def test_overlap() -> None:
    c = cases.call((6, 5))
    whole = np.zeros((7, 5), np.float32)
    parameters = c.gamma, c.beta, c.running_mean, c.running_var
    with pytest.raises(ValueError, match=r"^out: got memory shared"):
        infer(whole[:6], *parameters, 1e-5, 1, "relu", None, whole[1:], 1)
    with pytest.raises(ValueError, match=r"^out: got x itself"):
        step(c.x, parameters, out=c.x)
    cache = cache_of(c)
    both = np.zeros(c.dy.size + 1, np.float32)
    with pytest.raises(ValueError, match=r"^out: got memory shared"):
        fbn.backward(both[1:].reshape(c.dy.shape), cache, both[:-1].reshape(c.dy.shape), 1)
    wanted = fbn.backward(c.dy.copy(), cache, np.empty_like(c.dy), 1).dx
    assert fbn.backward(c.dy, cache, c.dy, 1).dx.ctypes.data == c.dy.ctypes.data
    cases.assert_same_bits(c.dy, wanted)
    with pytest.raises(ValueError, match=r"^dy: got another shape"):
        fbn.backward(c.dy[:3], cache, c.dy.copy(), 1)


@pytest.mark.parametrize("verb", ["infer", "train", "frozen"])
def test_out_shares_no_memory_with_parameters(verb: str) -> None:
    """Nor with statistics: a ValueError that names both, with nothing written; beside them it may lie."""
    memory = np.random.default_rng(0).uniform(1, 2, 60).astype(np.float32)
    x, out = memory[:20].reshape(4, 5), memory[40:].reshape(4, 5)
    names = ("gamma", "beta", "running_mean", "running_var")
    apart = [memory[i : i + 5] for i in (20, 25, 30, 35)]

    def call(*arrays: Array, out: Array = out) -> Any:
        if verb == "infer":
            return infer(x, *arrays, 1e-5, 1, "relu", None, out, 1)
        return step(x, arrays, training=verb == "train", out=out)[0]

    for i, name in enumerate(names):
        for shared in (memory[36:41], memory[45:50], memory[55:]):
            before = memory.tobytes()
            with pytest.raises(ValueError, match=rf"^out: got memory shared with {name}; allowed: an array of its own"):
                call(*apart[:i], shared, *apart[i + 1 :])
            assert memory.tobytes() == before
    copies = [array.copy() for array in apart]
    wanted = call(*copies, out=np.empty_like(x))
    cases.assert_same_bits(call(*apart), wanted)


CHANNELS = 5
SAVED = np.random.default_rng(0).uniform(1, 2, (6, CHANNELS))
LIKE_X = np.ones((6, CHANNELS, 4), np.float32)
FOREIGN: list[tuple[str, Any, type[Exception]]] = [
    ("saved", SAVED[:, :3].copy(), ValueError), ("saved", SAVED[:2], ValueError),
    ("saved", np.ones((7, CHANNELS)), ValueError), ("saved", np.ones((0, 0)), ValueError),
    ("saved", SAVED.ravel(), TypingError), ("saved", SAVED[None], TypingError), ("saved", None, TypingError),
    ("saved", SAVED.astype(np.float32), TypingError), ("saved", np.asfortranarray(SAVED), TypingError),
    ("saved", np.ones((6, 10))[:, ::2], TypingError), ("axis", 0, ValueError), ("axis", 3, ValueError),
    ("axis", -4, ValueError), ("axis", 1.0, TypingError), ("x", LIKE_X[:, :3].copy(), ValueError),
    ("x", LIKE_X.astype(np.int32), TypingError), ("x", LIKE_X[0, 0], TypingError), ("x", LIKE_X[:0], ValueError),
    ("x", LIKE_X[:1, :, :1].copy(), ValueError), ("activation", 99, ValueError), ("activation", -1, ValueError),
    ("activation", 2**32, ValueError), ("activation", "relu", TypingError), ("slope", np.nan, ValueError),
    ("slope", np.inf, ValueError), ("slope", None, TypingError), ("frozen", 1, TypingError),
    ("residual", LIKE_X[:3], ValueError), ("residual", LIKE_X[0], TypingError),
    ("residual", LIKE_X.astype(np.float64), TypingError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error"), FOREIGN, ids=range(len(FOREIGN)))
def test_a_cache_that_was_changed(name: str, value: Any, error: type[Exception]) -> None:
    """Is refused by its name, before a byte is read or written where the cache says."""
    changed = cache_of(cases.call(LIKE_X.shape))._replace(**{name: value})
    dy = np.ones(value.shape, np.float32) if name == "x" else LIKE_X.copy()
    before = dy.tobytes()
    with pytest.raises(error, match=rf"(?m)(^|TypingError: )cache\.({name}|saved): got .*; allowed: "):
        fbn.backward(dy, changed, dy, 1)
    assert dy.tobytes() == before


def test_a_cache_of_few_values() -> None:
    """With frozen statistics one value per channel has gradients, and none at all gives zeros."""
    with pytest.raises(TypingError, match=r"cache: got .*; allowed: the cache that forward returned"):
        fbn.backward(LIKE_X, (LIKE_X, SAVED))
    ones = np.ones(CHANNELS, np.float32)
    for rows, sums in ((1, 1.0), (0, 0.0)):
        x = LIKE_X[:rows, :, :1].copy()
        arrays = ones, 0 * ones, 0 * ones, ones
        _, _, got = step(x, arrays, training=False, eps=0.0, activation=None, residual=np.zeros_like(x))
        cases.assert_same_bits(tuple(got), (x, sums * ones, sums * ones, x))


def test_arrays_that_numba_takes_for_aligned() -> None:
    """As those in a tuple that comes from Python."""
    cache = cache_of(cases.call(LIKE_X.shape))
    fbn.backward(LIKE_X, cache, np.empty_like(LIKE_X), 1)
    memory = np.zeros(cache.saved.nbytes + 1, np.uint8)
    moved = memory[1:].view(np.float64).reshape(cache.saved.shape)
    moved[:] = cache.saved
    with pytest.raises((ValueError, TypingError), match=r"cache.*: got .*; allowed: "):
        fbn.backward(LIKE_X, cache._replace(saved=moved), np.empty_like(LIKE_X), 1)


def test_dx_is_not_written_over_the_cache() -> None:
    c = cases.call((4, 6))
    memory, cache = np.zeros(60), cache_of(c)
    saved = memory[:36].reshape(6, 6)
    saved[:] = cache.saved
    before = memory.tobytes()
    for start in (0, 24, 71):
        out = memory.view(np.float32)[start : start + 24].reshape(4, 6)
        with pytest.raises(ValueError, match=r"^out: got memory shared with cache.saved; allowed: an array of its own"):
            fbn.backward(c.dy, cache._replace(saved=saved), out, 1)
        assert memory.tobytes() == before
    fbn.backward(c.dy, cache._replace(saved=saved), memory.view(np.float32)[72:96].reshape(4, 6), 1)


WRONG_TYPES: list[tuple[str, Any]] = [
    ("x", np.ones((6, 5), np.int64)), ("x", np.ones((6, 10), np.float32)[:, ::2]), ("x", np.ones(6, np.float32)),
    ("x", np.ones((5, 6), np.float32).T), ("gamma", np.ones(5)), ("gamma", 1.0), ("beta", np.ones((5, 1), np.float32)),
    ("running_mean", np.ones(5)), ("residual", np.ones((6, 5))), ("residual", np.ones((6, 5, 1), np.float32)),
    ("out", np.ones((6, 5))), ("activation", 3), ("activation", ("leaky_relu", "steep")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=range(len(WRONG_TYPES)))
def test_wrong_types(name: str, value: Any) -> None:
    """Are refused when the call is compiled, by name."""
    c = cases.call((6, 5))
    given: dict[str, Any] = {
        "x": c.x, "gamma": c.gamma, "beta": c.beta, "running_mean": c.running_mean, "running_var": c.running_var,
        "activation": None, "residual": None, "out": None,
    }  # fmt: skip
    given[name] = value
    with pytest.raises(TypingError, match=f"{name}: got .*; allowed: "):
        fbn.infer(**given)


# In use --------------------------------------------------------------------------------------------------------------


@numba.njit(parallel=True)
def _in_prange(xs, gamma, mean, var):
    ys = np.empty_like(xs)
    for i in numba.prange(len(xs)):
        fbn.infer(xs[i], gamma, None, mean, var, activation="silu", out=ys[i])
    return ys


def test_prange() -> None:
    c = cases.call((64, 9, 5), axis=2)
    parameters = c.gamma, None, c.running_mean, c.running_var
    wanted = fastbn_c(fastbn.infer, c.x, *parameters, axis=2, activation="silu")
    cases.assert_same_bits(_in_prange(c.x, c.gamma, c.running_mean, c.running_var), wanted)


def test_many_threads() -> None:
    """At once, without the GIL, each using several threads of OpenMP."""
    c = cases.call((16, 12, 1023))

    def call(threads: int) -> Any:
        arrays = c.gamma, c.beta, c.running_mean.copy(), c.running_var.copy()
        return step(c.x, arrays, dy=c.dy, activation="silu", residual=c.residual, threads=threads)

    wanted = call(1)
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = call(2)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        cases.assert_same_bits((found[i][0], found[i][1].saved), (wanted[0], wanted[1].saved))
        cases.assert_same_bits(tuple(found[i][2]), tuple(wanted[2]))


CACHED = """
import numba, numpy as np, fastbn.numba as fbn

@numba.njit(cache=True)
def layer(x, gamma, beta, mean, var):  # as in the example, so that fastbn's part is compiled once for both
    y, cache = fbn.forward(x, gamma, beta, mean, var, activation="silu", residual=x)
    return y, fbn.backward(y, cache).dx
"""

USE = """
import layers, numpy as np, fastbn
x, parameters = np.random.default_rng(0).standard_normal((8, 3), np.float32), np.ones((4, 3), np.float32)
y, dx = layers.layer(x, *parameters.copy())
wanted, cache = fastbn.forward(x, *parameters.copy(), activation="silu", residual=x, backend="c")
same = np.array_equal(y, wanted) and np.array_equal(dx, fastbn.backward(y, cache, backend="c").dx)
print(same, sum(layers.layer.stats.cache_hits.values()))
"""


def test_kept_on_disk(tmp_path: Path) -> None:
    """A user's cache=True finds the C functions again in another process, wherever they are in its memory."""
    (tmp_path / "layers.py").write_text(CACHED, encoding="utf-8")
    folders = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    for hits in (0, 1):
        done = cases.run_python(USE, tmp_path, 120, PYTHONPATH=folders, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
        assert done.stdout.split() == ["True", str(hits)], done.stderr


FORKED = """
import os, numpy as np, fastbn.numba as fbn
x, p = np.ones((64, 64, 32), np.float32), np.ones(64, np.float32)
fbn.infer(x, p, p, p, p, 1e-5, 1, "relu", x, x.copy(), 4)
child = os.fork()
if not child:
    fbn.infer(x, p, p, p, p, 1e-5, 1, "relu", x, x.copy(), 4)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked(tmp_path: Path) -> None:
    """A child uses one thread, since its parent's are not there."""
    done = cases.run_python(FORKED, tmp_path, 120)
    assert done.stdout.split() == ["7"], done.stderr


def test_without_numba(tmp_path: Path) -> None:
    done = cases.run_python("import sys; sys.modules['numba'] = None; import fastbn.numba", tmp_path)
    assert 'ImportError: fastbn.numba needs Numba: pip install "fastbn[numba]"' in done.stderr


EXAMPLE = cases.CHECKOUT / "examples" / "numba_layers.py"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples are not beside the tests: no checkout")
def test_example(tmp_path: Path) -> None:
    """A jitted loop over layers, forward and backward. It says itself whether NumPy code gives the same bits."""
    done = cases.run_python(f"import runpy; runpy.run_path({str(EXAMPLE)!r}, None, '__main__')", tmp_path, 120)
    assert done.returncode == 0, done.stderr
    assert "jitted code gives the bits of NumPy code" in done.stdout
