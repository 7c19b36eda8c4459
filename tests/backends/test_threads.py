"""Do calls live with other threads and processes: many at once, nested, forked, limited by others, without the GIL?

Each that could hang or die does so in a process of its own, which has only so much time.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sysconfig
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn

Array = np.ndarray[Any, Any]
SECONDS = 120
"""That a process may take, Numba's compilation included."""

LAYERS = ("workqueue", "omp")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_c = pytest.mark.skipif("c" not in fastbn.backends(), reason="the C backend is not built")


START = """
import os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import fastbn

fastbn.set_backend(os.environ.get("FASTBN_BACKEND", "c"))
SHAPES = ((300, 400), (3, 40, 1000), (2, 3, 20_000), (4, 8), (40, 30, 64))
ARRAYS = [np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(SHAPES)]
ARRAYS.append(np.asfortranarray(ARRAYS[1]))
ARRAYS.append(ARRAYS[0][:, ::3])
one = np.ones(400, np.float32)
PLANS = [fastbn.InferencePlan(*[one[: x.shape[1]]] * 4, activation="relu") for x in ARRAYS]

def run(i):
    x = ARRAYS[i % len(ARRAYS)]
    mean, var = np.zeros((2, x.shape[1]), np.float32)
    y, cache = fastbn.forward(x, None, None, mean, var, activation="silu")
    found = [y, mean, var, fastbn.backward(x, cache).dx, fastbn.infer(x, None, None, mean, var)]
    found += [fastbn.moments(x).m2, fastbn.backward_sums(x, cache).sum_dy_xhat, PLANS[i % len(ARRAYS)](x)]
    return b"".join(array.tobytes() for array in found)

def alone():
    with fastbn.use_num_threads(1):
        return [run(i) for i in range(len(ARRAYS))]
"""


def check(script: str, folder: Path, **environment: str) -> None:
    """The script ends in time, by itself, having said that it is done."""
    done = cases.run_python(START + script + '\nprint("done")', folder, timeout=SECONDS, **environment)
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"this system has no {environment['NUMBA_THREADING_LAYER']}")
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def settings_of(backend: str, layer: str = "omp") -> dict[str, str]:
    """An environment in which the backend has several threads, on any machine."""
    return {
        "FASTBN_BACKEND": backend,
        "FASTBN_NUM_THREADS": "4",
        "NUMBA_NUM_THREADS": "4",
        "NUMBA_THREADING_LAYER": layer,
    }


WAYS = [(backend, layer) for backend in fastbn.backends() for layer in (LAYERS if backend == "numba" else LAYERS[1:])]
"""Every backend, Numba with the layer that takes one caller at a time, too."""

each_way = pytest.mark.parametrize(
    ("backend", "layer"), WAYS, ids=[f"{backend}-{layer}" if backend == "numba" else backend for backend, layer in WAYS]
)


# Without the GIL -----------------------------------------------------------------------------------------------------


def verbs() -> dict[str, Callable[[], Any]]:
    """Each takes several turns of the GIL."""
    x = np.ones((4, 8, 200_000), np.float32)
    out, one = np.empty_like(x), np.ones(8, np.float32)
    cache = fastbn.forward(x).cache
    plan = fastbn.InferencePlan(one, one, one, one)
    return {
        "forward": lambda: fastbn.forward(x, out=out),
        "backward": lambda: fastbn.backward(x, cache, out=out),
        "infer": lambda: fastbn.infer(x, one, one, one, one, out=out),
        "moments": lambda: fastbn.moments(x),
        "backward_sums": lambda: fastbn.backward_sums(x, cache),
        "plan": lambda: plan(x, out=out),
    }


@pytest.mark.parametrize("kernel", [kernel for kernel in cases.BACKENDS if kernel in cases.COMPILED], ids=str)
def test_the_gil_is_free_while_a_kernel_runs(kernel: cases.Kernel) -> None:
    """Another thread goes on counting. A kernel that held the GIL would let it count between two calls alone."""
    for name, call in verbs_of(kernel).items():
        call()
        ticks, job = 0, threading.Thread(target=_several, args=(kernel, call))
        job.start()
        while job.is_alive():
            ticks += 1
        assert ticks > 300, name


def verbs_of(kernel: cases.Kernel) -> dict[str, Callable[[], Any]]:
    with cases.running_on(kernel):
        return verbs()


def _several(kernel: cases.Kernel, call: Callable[[], Any]) -> None:
    with cases.running_on(kernel), fastbn.use_num_threads(1):
        for _ in range(5):
            call()


@pytest.mark.skipif(not (cases.CHECKOUT / "fastbn/_backends/c").is_dir(), reason="no sources beside the tests")
def test_the_extension_says_that_it_needs_no_gil() -> None:
    first = (cases.CHECKOUT / "fastbn/_backends/c/bridge.pyx").read_text(encoding="utf-8").partition("\n")[0]
    assert re.search(r"^# cython: .*\bfreethreading_compatible=True", first)


@needs_c
@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_the_gil_stays_off(tmp_path: Path) -> None:
    """An extension that does not say so turns it on, with a warning."""
    check("fastbn.forward(ARRAYS[0]); assert not sys._is_gil_enabled()", tmp_path, FASTBN_BACKEND="c")


# Many at once --------------------------------------------------------------------------------------------------------

ALONE = "wanted = alone()"

AT_ONCE = """
for _ in range(2):
    together = threading.Barrier(6)

    def work(first):
        together.wait()
        with fastbn.use_num_threads(1 + first % 4):
            return [run(i) == wanted[i % len(ARRAYS)] for i in range(first, first + len(ARRAYS))]

    with ThreadPoolExecutor(6) as pool:
        assert all(all(right) for right in pool.map(work, range(6)))
"""

SET_MEANWHILE = """
ended = threading.Event()

def change():
    n = 0
    while not ended.is_set():
        n = n % 4 + 1
        fastbn.set_num_threads(n)

changing = threading.Thread(target=change)
changing.start()
try:
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            assert list(pool.map(run, range(len(ARRAYS)))) == wanted
finally:
    ended.set()
    changing.join()
    fastbn.set_num_threads(4)
"""

ARRIVING = """
for _ in range(8):  # each thread is new, and may end while its team sleeps
    workers = [ThreadPoolExecutor(1) for _ in range(2)]
    assert [worker.submit(run, 1).result() for worker in workers] == [wanted[1]] * 2
    for worker in workers:
        worker.shutdown()
"""


INSIDE_A_POOL = """

def outer(i):
    with ThreadPoolExecutor(2) as pool, fastbn.use_num_threads(3):
        assert fastbn.get_num_threads() == 3
        inner = list(pool.map(run, (i, i + 1)))  # a thread of its own, which has the process's setting
        return [run(i), *inner] == [wanted[j % len(ARRAYS)] for j in (i, i, i + 1)]

with ThreadPoolExecutor(3) as pool:
    assert all(pool.map(outer, range(9)))
"""


@each_way
def test_many_threads(backend: str, layer: str, tmp_path: Path) -> None:
    """Every verb gives the bits that it gives alone."""
    check(ALONE + AT_ONCE + SET_MEANWHILE + ARRIVING + INSIDE_A_POOL, tmp_path, **settings_of(backend, layer))


# Nested --------------------------------------------------------------------------------------------------------------

INSIDE_NUMBA = """
import ctypes, numba
wanted, wrong = alone(), []

@ctypes.CFUNCTYPE(None, ctypes.c_long)
def call(i):
    if run(i) != wanted[i % len(ARRAYS)]:
        wrong.append(i)

@numba.njit(parallel=True, nogil=True)
def nest(n):
    for i in numba.prange(n):
        call(i)

for _ in range(3):
    nest(12)
assert numba.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]
assert wrong == []
"""


@needs_c
@pytest.mark.parametrize("layer", LAYERS)
def test_inside_a_parallel_loop_of_numba(layer: str, tmp_path: Path) -> None:
    """On the threads of another team: of the same OpenMP, or of none."""
    pytest.importorskip("numba")
    check(INSIDE_NUMBA, tmp_path, **settings_of("c", layer))


# Other processes -----------------------------------------------------------------------------------------------------

FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads

def in_child(task):
    child = os.fork()
    if child == 0:
        os._exit(0 if task() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

def right():
    return [run(i) for i in range(len(ARRAYS))] == wanted

def on_one_thread():
    with fastbn.use_num_threads(4):
        return fastbn.get_num_threads() == 1 and right()

def in_threads():
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(run, range(len(ARRAYS)))) == wanted

def in_grandchild():
    in_child(right)
    return right()

assert right()  # the parent's team is there
for task in (right, on_one_thread, in_threads, in_grandchild):
    in_child(task)
    assert right()
"""

FORK_WHILE_BUSY = """
ended = threading.Event()

def busy():
    while not ended.is_set():
        run(2)

others = [threading.Thread(target=busy) for _ in range(2)]
for other in others:
    other.start()
try:
    for _ in range(3):
        in_child(right)
finally:
    ended.set()
    for other in others:
        other.join()
"""


@needs_fork
@each_way
def test_forked_child(backend: str, layer: str, tmp_path: Path) -> None:
    """After use, and while others run: it has none of its parent's threads, for which GNU OpenMP would wait."""
    check(ALONE + FORK + FORK_WHILE_BUSY, tmp_path, **settings_of(backend, layer))


WORKER = """
import numpy as np
import fastbn

def run(seed):
    x = np.random.default_rng(seed).standard_normal((300, 400)).astype(np.float32)
    y, cache = fastbn.forward(x)
    return fastbn.backward(x, cache).dx.tobytes()
"""

POOL = """
import multiprocessing, os, sys, warnings
sys.path.insert(0, os.getcwd())
import worker

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    wanted = [worker.run(i) for i in range(4)]
    with multiprocessing.get_context("METHOD").Pool(2) as pool:
        assert pool.map(worker.run, range(4)) == wanted
    assert worker.run(1) == wanted[1]
    print("done")
"""


@needs_c
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    """A pool of processes, of every kind that there is, beside a parent that has threads."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    (tmp_path / "pool.py").write_text(POOL.replace("METHOD", method), encoding="utf-8")
    script = "import runpy, sys; sys.argv = ['pool.py']; runpy.run_path('pool.py', run_name='__main__')"
    done = cases.run_python(script, tmp_path, timeout=SECONDS, **settings_of("c"))
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


# Limited by others ---------------------------------------------------------------------------------------------------

LIMITS = """
import threadpoolctl
wanted = alone()
assert [run(i) for i in range(len(ARRAYS))] == wanted
assert any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info())
own = next(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp")
for limit in (1, 2, 3):
    with threadpoolctl.threadpool_limits(limit):
        assert fastbn.get_num_threads() == (limit if limit < own else 4)
        assert [run(i) for i in range(len(ARRAYS))] == wanted
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(run, range(len(ARRAYS)))) == wanted
assert [run(i) for i in range(len(ARRAYS))] == wanted
"""


@needs_c
def test_limits_of_threadpoolctl(tmp_path: Path) -> None:
    """They count where they are lower than OpenMP's own number was when fastbn was loaded."""
    pytest.importorskip("threadpoolctl")
    from fastbn._backends.c import bridge

    if not bridge.describe()["OpenMP"].startswith("yes"):
        pytest.skip("this build has no OpenMP")
    check(LIMITS, tmp_path, FASTBN_BACKEND="c", FASTBN_NUM_THREADS="4", OMP_NUM_THREADS="3")


BESIDE_TORCH = """
wanted = alone()
assert run(0) == wanted[0]  # the C backend is loaded
import torch
fastbn.set_num_threads(2)
a = torch.randn(300, 300)
product = a @ a
for threads in (2, 1, 2):
    torch.set_num_threads(threads)
    for _ in range(3):
        assert torch.allclose(a @ a, product, rtol=1e-3, atol=1e-3)
        assert [run(i) for i in range(len(ARRAYS))] == wanted
"""


@needs_c
def test_beside_the_threads_of_torch(tmp_path: Path) -> None:
    """Which brings an OpenMP of its own: that which is loaded first serves both, if they are of one name."""
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    check(BESIDE_TORCH, tmp_path, FASTBN_BACKEND="c")
