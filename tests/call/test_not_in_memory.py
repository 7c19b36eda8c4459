"""Are arrays that are lazy or on disk refused, rather than loaded whole, and does the message say what to do?"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from test_checks import assert_refused, good

import fastbn

Array = np.ndarray[Any, Any]
PACKAGES = {"dask": (".compute()", "fastbn.dask"), "zarr": ("[...]", "fastbn.dask"), "h5py": ("[...]", "fastbn.dask")}
"""And the words that a message must have."""


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which other packages give when they are imported
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"needs {name.partition('.')[0]}")


def lookalike(package: str) -> Callable[[Array], Any]:
    """Makes objects that NumPy would load, of a class of that package, which need not be installed."""

    def load(self: Any, dtype: Any = None, copy: Any = None) -> Array:
        raise AssertionError("the array was loaded")

    of_package = type("Array", (), {"__module__": f"{package}.core.array", "__array__": load})
    derived = type("Derived", (of_package,), {"__module__": "my_package"})
    return lambda values: derived()


Store = tuple[Callable[[Array], Any], tuple[str, ...]]


@pytest.fixture(params=[*PACKAGES, *(f"like {name}" for name in PACKAGES)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A function that makes an array of the package, and the words that the message must have."""
    like = request.param.removeprefix("like ")
    words = (like, "not in memory", *PACKAGES[like])
    if request.param != like:
        yield lookalike(like), words
    elif like == "dask":
        da = imported("dask.array")
        yield da.from_array, words
    elif like == "zarr":
        zarr = imported("zarr")
        yield lambda values: zarr.array(np.asarray(values)), words
    else:
        with imported("h5py").File(tmp_path / "data.h5", "w") as file:
            yield lambda values: file.create_dataset(str(len(file)), data=values), words


@pytest.mark.parametrize("argument", ["x", "gamma", "beta", "running_mean", "running_var", "residual", "out"])
@pytest.mark.parametrize("function", [fastbn.forward, fastbn.infer], ids=lambda f: str(f.__name__))
def test_arguments(store: Store, function: Callable[..., Any], argument: str) -> None:
    arguments = good()
    make, words = store
    arguments[argument] = make(arguments[argument])
    assert_refused(function, arguments, TypeError, f"{argument}: got", *words)


def test_other_functions(store: Store) -> None:
    make, words = store
    x: Array = good()["x"]
    cache = fastbn.forward(x).cache
    plan = fastbn.InferencePlan(None, None, np.zeros(3, np.float32), np.ones(3, np.float32))
    bn = fastbn.BatchNorm(3)
    ones, lazy = np.ones(3), make(np.ones(3))
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("mask", lambda: fastbn.forward(x, mask=make(np.ones((4, 5), bool)))),
        ("x", lambda: fastbn.moments(make(x))),
        ("mask", lambda: fastbn.moments(x, mask=make(np.ones((4, 5), bool)))),
        ("dy", lambda: fastbn.backward(make(x), cache)),
        ("out", lambda: fastbn.backward(x, cache, out=make(x))),
        ("dy", lambda: fastbn.backward_sums(make(x), cache)),
        ("x", lambda: plan(make(x))),
        ("out", lambda: plan(x, out=make(x))),
        ("residual", lambda: plan(x, residual=make(x))),
        ("x", lambda: bn(make(x))),
        ("mask", lambda: bn(x, mask=make(np.ones((4, 5), bool)))),
        ("running_mean", lambda: fastbn.InferencePlan(None, None, lazy, ones)),
        ("gamma", lambda: fastbn.InferencePlan(lazy, None, ones, ones)),
        ("weight", lambda: setattr(bn, "weight", lazy)),
        ("running_var", lambda: setattr(bn, "running_var", lazy)),
        ("weight", lambda: fastbn.fold(make(np.ones((3, 2))), None, None, None, ones, ones)),
        ("running_var", lambda: fastbn.fold(np.ones((3, 2)), None, None, None, ones, lazy)),
        ("m2", lambda: fastbn.Moments(4, ones, lazy)),
    ]
    for argument, call in calls:
        assert_refused(call, {}, TypeError, f"{argument}: got", *words)
    assert bn.num_batches_tracked == 0


def test_states_are_loaded(tmp_path: Path) -> None:
    """From a file, since that is what load_state_dict is for."""
    bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    bn(good()["x"])
    with imported("h5py").File(tmp_path / "state.h5", "w") as file:
        for name, value in bn.state_dict().items():
            file[name] = value
        other.load_state_dict(file)
    cases.assert_same_bits(
        tuple(map(np.asarray, other.state_dict().values())), tuple(map(np.asarray, bn.state_dict().values()))
    )


def test_memory_maps_are_arrays(any_backend: cases.Kernel, tmp_path: Path) -> None:
    """They stay as welcome as they were."""
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(8, 3, 5))
    x[...] = cases.call(x.shape).x
    cases.assert_same_bits(fastbn.forward(x).y, fastbn.forward(np.array(x)).y)
    assert fastbn.moments(x) == fastbn.moments(np.array(x))


def test_nothing_is_imported(tmp_path: Path) -> None:
    """To tell where an array comes from, its package is not needed."""
    script = (
        "import sys, numpy as np, fastbn\n"
        "Lazy = type('Array', (), {'__module__': 'dask.array.core'})\n"
        "try:\n    fastbn.moments(Lazy())\n"
        "except TypeError as error:\n    print(error)\n"
        f"print([name for name in {tuple(PACKAGES)} if name in sys.modules])"
    )
    done = cases.run_python(script, tmp_path)
    assert "fastbn.dask" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
