"""Which backend is used, and do all of them agree?"""

from __future__ import annotations

import threading
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import numpy as np
import pytest
from test_checks import assert_refused

import fastbn
from fastbn._backends import Backend, select

BACKENDS = fastbn.backends()


def test_best_first() -> None:
    order = ("c", "numba", "numpy")
    assert [name for name in order if name in BACKENDS] == list(BACKENDS)
    assert BACKENDS[-1] == "numpy"


def test_the_compiled_backend_is_built() -> None:
    """Every other test passes without it, on the other backends alone."""
    assert "c" in BACKENDS


@pytest.mark.parametrize("name", BACKENDS)
def test_protocol(name: str) -> None:
    """A backend has the protocol's functions, and describes itself in strings."""
    backend = select(name)
    assert isinstance(backend, ModuleType)
    for verb in (verb for verb in vars(Backend) if not verb.startswith("_")):
        assert callable(getattr(backend, verb))
    assert all(isinstance(part, str) for item in backend.describe().items() for part in item)


def test_the_best_is_the_default(tmp_path: Path) -> None:
    done = cases.run_python("import fastbn; print(fastbn.get_backend())", tmp_path)
    assert done.stdout.strip() == BACKENDS[0]


def test_which_goes_first(settings: None) -> None:
    """The innermost block, then the process."""
    fastbn.set_backend("numpy")
    assert fastbn.get_backend() == "numpy"
    for name in BACKENDS:
        with fastbn.use_backend(name):
            assert fastbn.get_backend() == name
            with fastbn.use_backend("numpy"):
                assert fastbn.get_backend() == "numpy"
            assert fastbn.get_backend() == name
    assert fastbn.get_backend() == "numpy"


@pytest.mark.parametrize("name", BACKENDS)
def test_the_one_that_is_named_does_the_work(name: str, monkeypatch: pytest.MonkeyPatch, settings: None) -> None:
    """Whichever way it is named, and nobody else does: no backend falls back to another."""
    calls: list[tuple[str, str]] = []
    for backend in BACKENDS:
        for verb in ("forward", "infer", "backward"):
            _spy(monkeypatch, backend, verb, calls)
    c = cases.call((6, 5, 3))

    def run(**chosen: str) -> None:
        _, cache = fastbn.forward(c.x, c.gamma, c.beta, **chosen)
        fastbn.backward(c.dy, cache, **chosen)
        fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, **chosen)

    wanted = [(name, verb) for verb in ("forward", "backward", "infer")]
    run(backend=name)
    with fastbn.use_backend(name):
        run()
    fastbn.set_backend(name)
    run()
    assert calls == wanted * 3


def _spy(monkeypatch: pytest.MonkeyPatch, name: str, verb: str, calls: list[tuple[str, str]]) -> None:
    """Has a backend write down the calls that it does not turn away: its express lane returns None for those."""
    backend = select(name)
    for lane in (verb, f"express_{verb}"):
        if original := getattr(backend, lane, None):
            monkeypatch.setattr(backend, lane, _spied(original, (name, verb), calls, returns=lane != verb))


def _spied(original: Any, entry: tuple[str, str], calls: list[tuple[str, str]], returns: bool) -> Any:
    def called(*arguments: Any) -> Any:
        done = original(*arguments)
        if not returns or done is not None:
            calls.append(entry)
        return done

    return called


@pytest.mark.parametrize("kernel", [kernel for kernel in cases.KERNELS if kernel.isa], ids=str, indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("place", [*cases.DENSE, "every second element", "cropped"])
@pytest.mark.parametrize("others", ["alike", "C order", "every second element"])
def test_the_express_lane_gives_what_the_front_desk_gives(
    kernel: cases.Kernel, dtype: str, training: bool, place: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, for small arrays in any order, which it takes itself. The front desk gets types that it does not."""
    move, move_others = (cases.PLACEMENTS[place if name == "alike" else name] for name in ("alike", others))
    for shape, axis, wide, activation in (
        ((40, 19, 1, 1), 1, ("running_mean", "running_var"), "relu"),
        ((4, 5, 30, 19), 3, (), ("leaky_relu", 0.3)),
        ((6, 2, 5, 3), -2, ("gamma", "beta"), "leaky_relu"),
        ((2, 2, 1, 1), 0, ("gamma", "beta", "running_mean", "running_var"), "silu"),
        ((5, 1, 7, 3), 1, (), ("leaky_relu", -2.0)),
    ):
        c = cases.call(shape, dtype, axis)
        c = c._replace(**{name: getattr(c, name).astype("f8") for name in wide})
        x, dy, residual = move(c.x), move_others(c.dy), move_others(c.residual)
        found = []
        for express in (True, False):
            number = float if express else np.float64
            mean, var = c.running_mean.copy(), c.running_var.copy()
            with monkeypatch.context() as patched:
                for verb in ("forward", "infer", "backward") if express else ():
                    patched.delattr(select("c"), verb)
                y, cache = fastbn.forward(
                    x, c.gamma, c.beta, mean, var, training=training, momentum=number(0.3), eps=number(0.01), axis=axis,
                    activation=activation, residual=residual,
                )  # fmt: skip
                gradients = fastbn.backward(dy if express else dy.view(np.memmap), cache)
                inferred = fastbn.infer(
                    x, c.gamma, None, mean, var, eps=number(0.01), axis=axis, activation=activation, residual=residual
                )
            found.append((y, mean, var, cache.mean, cache.var, *gradients, gradients.dresidual, inferred))
        cases.assert_same_bits(*found, f"for {shape}, axis {axis}")
        for express, front in zip(*found, strict=True):
            steps = [[step for step, n in zip(a.strides, a.shape, strict=True) if n > 1] for a in (express, front)]
            assert steps[0] == steps[1], f"for {shape}, axis {axis}"


def test_a_copy_does_not_hide_shared_memory(any_backend: cases.Kernel) -> None:
    """Running statistics within a strided x or residual are refused."""
    whole = np.random.default_rng(0).standard_normal((6, 5, 3)).astype("f4")
    one = np.ones(3, "f4")
    for x, residual in ((whole[:, 0], None), (whole[:, 0].copy(), whole[:, 0])):
        arguments = {"x": x, "running_mean": whole[2, 0], "running_var": one, "residual": residual}
        assert_refused(fastbn.forward, arguments, ValueError, "running_mean", "shared")


def test_what_is_no_data_is_not_copied(any_backend: cases.Kernel) -> None:
    """Which structured arrays might not survive. x is refused."""
    wide, other = np.zeros((8, 6), [("a", "f4")]), np.zeros((8, 6), [("b", "S4")])
    for x, residual in ((wide, other[::-1]), (wide[::2], other[:4]), (wide.astype("O")[::2], None)):
        arguments = {"x": x, "residual": residual}
        assert_refused(fastbn.forward, arguments, TypeError, "x: got dtype", "float16")


def test_block_ends_with_an_exception() -> None:
    before = fastbn.get_backend()
    with pytest.raises(KeyError), fastbn.use_backend("numpy"):
        raise KeyError
    assert fastbn.get_backend() == before


def test_block_is_of_its_thread() -> None:
    before, seen = fastbn.get_backend(), []
    with fastbn.use_backend("numpy"):
        thread = threading.Thread(target=lambda: seen.append(fastbn.get_backend()))
        thread.start()
        thread.join()
    assert seen == [before]


@pytest.mark.parametrize("choose", [fastbn.set_backend, fastbn.use_backend])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("cuda", ValueError),
        ("", ValueError),
        ("NumPy", ValueError),
        (1, TypeError),
        (None, TypeError),
        (["c"], TypeError),
    ],
)
def test_unknown_backend(choose: Any, name: Any, error: type[Exception], settings: None) -> None:
    before = fastbn.get_backend()

    def enter(name: Any) -> None:
        with choose(name) or fastbn.use_backend("numpy"):
            pass

    assert_refused(enter, {"name": name}, error, "backend", repr(name), "'c'", "'numba'", "'numpy'")
    assert fastbn.get_backend() == before


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # as if it were not installed
import numpy as np, fastbn
assert "numba" not in fastbn.backends()
try:
    fastbn.forward(np.ones((3, 2)), backend="numba")
except ImportError as error:
    print(error)
assert fastbn.get_backend() != "numba"
"""


def test_numba_is_missing(tmp_path: Path) -> None:
    """Said with the name of the extra that brings it; no other backend steps in."""
    done = cases.run_python(WITHOUT_NUMBA, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fastbn[numba]" in done.stdout


@pytest.mark.parametrize(("first", "second"), list(permutations(BACKENDS, 2)))
def test_backward_on_another_backend(first: str, second: str, dtype: str) -> None:
    """A cache belongs to no backend, and they agree on the gradient."""
    for shape in ((40, 19), (4, 19, 30)):
        c = cases.call(shape, dtype)
        for training in (True, False):
            _, cache = fastbn.forward(
                c.x, c.gamma, c.beta, c.running_mean, c.running_var, training=training, residual=c.residual,
                activation="relu", backend=first,
            )  # fmt: skip
            got, wanted = (fastbn.backward(c.dy, cache, backend=name) for name in (second, first))
            rtol = 64 * np.finfo(dtype).eps
            for a, b in zip((*got, got.dresidual), (*wanted, wanted.dresidual), strict=True):
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1, float(abs(b).max())))


def test_an_infinite_mean_stays_infinite(any_backend: cases.Kernel) -> None:
    x, mean, var = np.array([[1.0, 2], [np.inf, 3], [4, 4]]), np.zeros(2), np.ones(2)
    cache = fastbn.forward(x, None, None, mean, var, momentum=1.0).cache
    assert cache.mean.tolist() == [np.inf, 3]
    assert mean.tolist() == [np.inf, 3]
    assert fastbn.moments(x).mean.tolist() == [np.inf, 3]


LATE = """
import threading, time
import numpy as np, fastbn
fastbn.set_backend("{}")
fastbn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((64, 64, 14, 14), dtype=np.float32)
wanted = fastbn.forward(x).y
def work():
    time.sleep(0.5)
    print(np.array_equal(fastbn.forward(x).y, wanted))
threading.Thread(target=work).start()
"""


def test_a_thread_that_outlives_the_main_thread(any_backend: cases.Kernel, tmp_path: Path) -> None:
    """The interpreter then starts no more threads, but the call has the same bits on one."""
    done = cases.run_python(LATE.format(any_backend.backend), tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
