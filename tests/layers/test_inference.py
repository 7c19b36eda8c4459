"""Does an inference plan do what infer does, to the bit and to the message, with nothing allocated?"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn
from fastbn.call.blocks import PIECE

Array = np.ndarray[Any, Any]
C_KERNELS = [kernel for kernel in cases.KERNELS if kernel.backend == "c"]
EXAMPLE = cases.CHECKOUT / "examples" / "inference_plan.py"


def constants(c: cases.Call) -> tuple[Array | None, Array | None, Array, Array]:
    return c.gamma, c.beta, c.running_mean, c.running_var


def compare(c: cases.Call, where: str = "", *, residual: Array | None = None, **options: Any) -> fastbn.InferencePlan:
    """Holds a fresh plan against infer: a new result, one that was given, and in place."""
    plan = fastbn.InferencePlan(*constants(c), **options)
    wanted = fastbn.infer(c.x, *constants(c), residual=residual, **options)
    got = plan(c.x, residual=residual)
    cases.assert_same_bits(got, wanted, where)
    cases.assert_placed(got, c.x, None, where)
    out = np.empty_like(wanted)
    assert plan(c.x, out, residual) is out
    cases.assert_same_bits(out, wanted, where)
    if c.x.dtype.isnative and c.x.flags.writeable:
        x = c.x.copy(order="K")
        assert plan(x, out=x, residual=residual) is x
        cases.assert_same_bits(x, wanted, where)
    return plan


def test_signature() -> None:
    def bare(function: Any) -> str:
        found = inspect.signature(function)
        parameters = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
        return str(found.replace(parameters=parameters, return_annotation=found.empty))

    assert bare(fastbn.InferencePlan) == (
        "(gamma, beta, running_mean, running_var, *, eps=1e-05, axis=1, activation=None)"
    )
    assert bare(fastbn.InferencePlan.__call__) == "(x, out=None, residual=None)"


@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", [*cases.DTYPES, *cases.HALVES])
def test_bits_of_infer(kernel: cases.Kernel, kind: str, activation: Any) -> None:
    for shape in (
        (1, 64),
        (1, 1),
        (5, 3),
        (300, 7),
        (2, 19, 5),
        (3, 16, 7, 7),
        (2, 1, 33),
        (5_000, 1),
        (40, 1, 7, 7),
        (3, 1, 100, 50),
        (1, 70, 1),
        (2, 3, 2, 3, 4),
    ):
        c = cases.call(shape, kind, offset=3)
        compare(c, str(shape), activation=activation)
        compare(c, f"{shape} with a residual", activation=activation, residual=c.residual, eps=0.25)


@pytest.mark.parametrize("place", cases.PLACEMENTS)
def test_any_strides(any_backend: cases.Kernel, dtype: str, place: str) -> None:
    move = cases.PLACEMENTS[place]
    c = cases.call((3, 5, 4, 6), dtype)
    compare(c._replace(x=move(c.x)), activation="relu", residual=move(c.residual))
    plan = fastbn.InferencePlan(*constants(c))
    out = move(np.zeros_like(c.x))
    if out.flags.writeable and out.dtype.isnative:  # and x in another order
        assert plan(c.x, out=out, residual=c.residual) is out
        assert np.array_equal(out, fastbn.infer(c.x, *constants(c), residual=c.residual))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -4])
def test_any_axis(kernel: cases.Kernel, axis: int) -> None:
    c = cases.call((3, 5, 4, 6), axis=axis)
    compare(c, axis=axis, residual=c.residual)
    turned = np.ascontiguousarray(np.moveaxis(c.x, axis, -1))
    compare(c._replace(x=np.moveaxis(turned, -1, axis)), axis=axis)


def test_many_ranks() -> None:
    """One plan for arrays of any number of axes, and one call after another."""
    c = cases.call((4, 5))
    plan = fastbn.InferencePlan(*constants(c), axis=-1)
    for shape in ((4, 5), (2, 3, 5), (1, 1, 5), (2, 2, 2, 5), (7, 5)):
        x = cases.call(shape, axis=-1).x
        cases.assert_same_bits(plan(x), fastbn.infer(x, *constants(c), axis=-1))


@pytest.mark.parametrize("given", ["float16", "float32", "float64", "longdouble", "list", "none", "byteswapped"])
def test_parameters_of_any_kind(kernel: cases.Kernel, given: str) -> None:
    c = cases.call((6, 5, 3))
    change = {"none": lambda p: None, "list": np.ndarray.tolist, "byteswapped": lambda p: p.astype(">f4")}
    gamma, beta = map(change.get(given, lambda p: p.astype(given) / 3), (c.gamma, c.beta))
    compare(c._replace(gamma=gamma, beta=beta))
    compare(c._replace(gamma=gamma, running_var=c.running_var.astype(">f4")))
    compare(c._replace(beta=beta, running_mean=np.repeat(c.running_mean, 2)[::2]))


def test_extreme_channels(kernel: cases.Kernel, dtype: str) -> None:
    """Constants that need care, and those that are not finite."""
    c = cases.call((6, 8, 3), dtype)
    gamma, var, mean = c.gamma.copy(), c.running_var.copy(), c.running_mean.copy()
    gamma[:2], var[:6], mean[3:5] = (1e30, 0), (1e-38, 1, 0, 1e36, np.inf, np.nan), (1e30, -np.inf)
    compare(c._replace(gamma=gamma, running_mean=mean, running_var=var), eps=0)


def test_arrays_are_copied(kernel: cases.Kernel) -> None:
    c = cases.call((6, 5, 3))
    wanted = fastbn.infer(c.x, *constants(c))
    given = tuple(array.copy() for array in constants(c))
    first, second = fastbn.InferencePlan(*given), fastbn.InferencePlan(*given)
    first(c.x)
    for array in given:
        array[...] = np.nan
    for plan in (first, second):
        cases.assert_same_bits(plan(c.x), wanted)


def test_backend_of_the_call() -> None:
    """Not that of an earlier one."""
    c = cases.call((6, 50, 30), offset=100)
    plan = fastbn.InferencePlan(*constants(c), activation="silu")
    for kernel in (*cases.KERNELS, *cases.KERNELS):
        with cases.running_on(kernel):
            cases.assert_same_bits(plan(c.x), fastbn.infer(c.x, *constants(c), activation="silu"), str(kernel))


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (5000, 100)], ids=str)
def test_any_number_of_threads(kernel: cases.Kernel, shape: tuple[int, ...]) -> None:
    c = cases.call(shape)
    plan = fastbn.InferencePlan(*constants(c), activation="relu")
    wanted = fastbn.infer(c.x, *constants(c), activation="relu")
    for threads in (1, 2, 3, 8):
        with fastbn.use_num_threads(threads):
            cases.assert_same_bits(plan(c.x), wanted)


# What is quick -------------------------------------------------------------------------------------------------------


def runs(plan: fastbn.InferencePlan, x: Array, out: Array | None, residual: Array | None = None) -> bool:
    """Whether the backend's own plan takes the call, and infer does not."""
    plan(x)
    _, run = plan._prepared
    return run is not None and run(x, out, residual) is not None


@pytest.mark.parametrize("kernel", C_KERNELS, ids=str, indirect=True)
def test_what_a_plan_takes(kernel: cases.Kernel) -> None:
    """Dense arrays that lie alike; without `out`, small ones of any positive strides; and what it leaves to infer."""
    c = cases.call((3, 5, 4, 6))
    plan = fastbn.InferencePlan(*constants(c))
    for place, move in cases.PLACEMENTS.items():
        x, residual, out = move(c.x), move(c.residual), move(np.zeros_like(c.x))
        dense = place in (*cases.DENSE, "odd address")
        assert runs(plan, x, out, residual) == dense, place
    assert runs(plan, cases.PLACEMENTS["read-only"](c.x), np.empty_like(c.x), cases.PLACEMENTS["read-only"](c.x))
    assert runs(plan, c.x, c.x)
    assert not runs(plan, c.x, np.asfortranarray(c.x))
    assert runs(plan, cases.PLACEMENTS["every second element"](c.x), None, np.asfortranarray(c.x))
    assert not runs(plan, cases.PLACEMENTS["negative strides"](c.x), None)
    for rows, fits in ((PIECE // 5, True), (PIECE // 5 + 1, False)):
        assert runs(plan, np.zeros((2 * rows, 5), "f4")[::2], None) == fits, "as much as infer copies as a whole"
    assert not runs(plan, c.x, c.x.reshape(1, *c.x.shape)[0].view(np.memmap))
    for axis in range(4):
        moved = cases.call((3, 5, 4, 6), axis=axis)
        assert runs(fastbn.InferencePlan(*constants(moved), axis=axis - 4), moved.x, np.empty_like(moved.x))


@pytest.mark.parametrize("kernel", C_KERNELS, ids=str, indirect=True)
@pytest.mark.parametrize("place", cases.DENSE)
@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (8, 32, 40, 40), (2, 3000, 2, 2)], ids=str)
def test_nothing_is_allocated(kernel: cases.Kernel, shape: tuple[int, ...], place: str) -> None:
    """Beyond the objects of a Python call: no array, and no workspace, which would grow with the channels."""
    c = cases.call(shape)
    x, residual = map(cases.PLACEMENTS[place], (c.x, c.residual))
    out = np.empty_like(x)
    plan = fastbn.InferencePlan(*constants(c), activation="relu")
    plan(x, out, residual)
    tracemalloc.start()
    try:
        plan(x, out, residual)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1000


# Objects -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy"])
def test_copies(kernel: cases.Kernel, way: str) -> None:
    c = cases.call((6, 5, 3))
    plan = fastbn.InferencePlan(*constants(c), eps=0.5, axis=-2, activation=("leaky_relu", 0.3))
    wanted = plan(c.x)
    again = {"pickle": lambda p: pickle.loads(pickle.dumps(p)), "copy": copy.copy, "deepcopy": copy.deepcopy}[way](plan)
    assert repr(again) == repr(plan)
    cases.assert_same_bits(again(c.x), wanted)


def test_pickle_goes_to_another_process(tmp_path: Path) -> None:
    c = cases.call((6, 5, 3))
    plan = fastbn.InferencePlan(*constants(c), activation="relu6")
    (tmp_path / "plan").write_bytes(pickle.dumps((plan, c.x)))
    script = "import pickle; plan, x = pickle.load(open('plan', 'rb')); open('y', 'wb').write(plan(x).tobytes())"
    done = cases.run_python(f"import warnings; warnings.simplefilter('ignore'); {script}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "y").read_bytes() == plan(c.x).tobytes()


def test_repr() -> None:
    c = cases.call((6, 5), "float64")
    plan = fastbn.InferencePlan(*constants(c), axis=-1, activation="relu")
    assert repr(plan) == "InferencePlan(5 channels of float64, eps=1e-05, axis=-1, activation='relu')"


def test_many_threads_at_once(any_backend: cases.Kernel) -> None:
    """From the first call on, which prepares the plan."""
    c = cases.call((1, 64))
    plan = fastbn.InferencePlan(*constants(c), activation="silu")
    xs = [cases.call((1, 64), seed=seed).x for seed in range(8)]
    wanted = [fastbn.infer(x, *constants(c), activation="silu") for x in xs]
    start, wrong = threading.Barrier(len(xs)), []

    def work(x: Array, exact: Array) -> None:
        with cases.running_on(any_backend):
            out = np.empty_like(x)
            start.wait()
            for _ in range(200):
                out[...] = np.nan
                plan(x, out=out)
                if out.tobytes() != exact.tobytes():
                    wrong.append(out.copy())

    workers = [threading.Thread(target=work, args=some) for some in zip(xs, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Bad input -----------------------------------------------------------------------------------------------------------

X = np.zeros((4, 3, 2), np.float32)
BAD_CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "integers": (X.astype(int), {}),
    "a list of strings": (["a", "b"], {}),
    "longdouble": (X.astype(np.longdouble), {}),
    "one axis": (X[0, 0], {}),
    "no axis": (np.float32(3), {}),
    "a masked array": (np.ma.masked_array(X), {}),
    "out of another dtype": (X, {"out": X.astype(np.float64)}),
    "out of another shape": (X, {"out": X[:2].copy()}),
    "out that is no array": (X, {"out": X.tolist()}),
    "out that is read-only": (X, {"out": np.broadcast_to(np.float32(0), X.shape)}),
    "residual of another shape": (X, {"residual": X[0]}),
    "residual of another dtype": (X, {"residual": X.astype(np.float16)}),
}


def test_an_x_that_does_not_fit_the_plan_is_named(any_backend: cases.Kernel) -> None:
    plan = fastbn.InferencePlan(None, None, np.zeros(3, np.float32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"^x: got shape .* with 2 channels; allowed: the plan's 3 channels$"):
        plan(X[:, :2])
    with pytest.raises(TypeError, match=r"^x: got dtype float64; allowed: .*float32$"):
        plan(X.astype(np.float64))


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_errors_are_those_of_infer(any_backend: cases.Kernel, bad: str) -> None:
    x, options = BAD_CALLS[bad]
    given = (None, None, np.zeros(3, np.float32), np.ones(3, np.float32))
    plan = fastbn.InferencePlan(*given)
    with pytest.raises((TypeError, ValueError)) as wanted:
        fastbn.infer(x, *given, **options)
    with pytest.raises(type(wanted.value), match=f"^{re.escape(str(wanted.value))}$"):
        plan(x, **options)


def test_overlapping_memory_is_refused(any_backend: cases.Kernel) -> None:
    memory = np.zeros(100, np.float32)
    before = memory.tobytes()
    plan = fastbn.InferencePlan(None, None, np.ones(3, np.float32), np.ones(3, np.float32))
    x, shifted, apart = (memory[start : start + 12].reshape(4, 3) for start in (0, 3, 50))
    for call in (
        {"out": shifted},
        {"out": apart, "residual": apart},
        {"out": x, "residual": memory[5:17].reshape(4, 3)},
    ):
        with pytest.raises(ValueError, match=r"^out: got memory shared with (x|residual)"):
            plan(x, **call)
    assert memory.tobytes() == before


@pytest.mark.parametrize("axis", [2, -3, 10**30])
def test_axis_that_x_has_not(any_backend: cases.Kernel, axis: int) -> None:
    plan = fastbn.InferencePlan(None, None, np.ones(3, np.float32), np.ones(3, np.float32), axis=axis)
    with pytest.raises(ValueError, match=f"^axis: got {axis}"):
        plan(np.ones((3, 3), np.float32))


BAD_PLANS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no statistics": ({"running_mean": None, "running_var": None}, ValueError, "running_mean: got None"),
    "no mean": ({"running_mean": None}, ValueError, "running_mean: got None beside running_var"),
    "no variance": ({"running_var": None}, ValueError, "running_var: got None beside running_mean"),
    "a list": ({"running_mean": [0.0, 0.0, 0.0]}, TypeError, "running_mean: got list"),
    "integers": ({"running_mean": np.zeros(3, int)}, TypeError, "running_mean: got dtype int64"),
    "halves": ({"running_mean": np.zeros(3, np.float16)}, TypeError, "running_var: got dtype float64"),
    "two axes": ({"running_mean": np.zeros((1, 3))}, ValueError, "running_mean: got shape"),
    "a shorter variance": ({"running_var": np.ones(2)}, ValueError, r"running_var: got shape \(2,\)"),
    "two dtypes": ({"running_var": np.ones(3, np.float32)}, TypeError, "running_var: got dtype float32"),
    "gamma of integers": ({"gamma": np.ones(3, int)}, TypeError, "gamma: got dtype int64"),
    "longer gamma": ({"gamma": np.ones(4)}, ValueError, r"gamma: got shape \(4,\)"),
    "beta of strings": ({"beta": ["a"] * 3}, TypeError, "beta: got dtype"),
    "negative eps": ({"eps": -1}, ValueError, "eps: got -1"),
    "eps of NaN": ({"eps": np.nan}, ValueError, "eps: got nan"),
    "axis": ({"axis": 1.0}, TypeError, "axis: got 1.0"),
    "activation": ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
}


@pytest.mark.parametrize("bad", BAD_PLANS)
def test_bad_plans(bad: str) -> None:
    change, error, message = BAD_PLANS[bad]
    given = {"gamma": None, "beta": None, "running_mean": np.zeros(3), "running_var": np.ones(3)} | change
    with pytest.raises(error, match=f"^{message}.*; allowed: "):
        fastbn.InferencePlan(**given)


def test_no_values(any_backend: cases.Kernel) -> None:
    c = cases.call((3, 5))
    for x in (np.zeros((0, 5), np.float32), np.zeros((2, 5, 0), np.float32)):
        y = fastbn.InferencePlan(*constants(c))(x)
        assert y.shape == x.shape
    none = np.zeros(0, np.float32)
    assert fastbn.InferencePlan(None, none, none, none)(np.zeros((4, 0), np.float32)).shape == (4, 0)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples are not beside the tests: no checkout")
def test_example(tmp_path: Path) -> None:
    done = cases.run_python(EXAMPLE.read_text(encoding="utf-8"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8000 calls: the bits of fastbn.infer" in done.stdout
    assert re.search(r"a call on \(1, 64\): \d+\.\d+ us", done.stdout)


# Plans of layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_plan_of_a_layer(dtype: str) -> None:
    rng = np.random.default_rng(0)
    bn = fastbn.BatchNorm(5, axis=-1, eps=1e-3, activation="silu", dtype=dtype)
    bn(rng.normal(3, 2, (40, 5)).astype(dtype))
    plan, x = bn.plan(), rng.normal(3, 2, (7, 5)).astype(dtype)
    assert np.array_equal(plan(x), bn.eval()(x))
    assert (plan.channels, plan.axis, plan.eps, plan.activation) == (5, -1, 1e-3, "silu")
    assert plan.dtype == (np.float64 if dtype == "float64" else np.float32)
    before = plan(x)
    bn.running_mean += 1  # a plan keeps what the layer had
    assert np.array_equal(plan(x), before)


def test_attributes_of_a_plan_are_read_only() -> None:
    plan = fastbn.BatchNorm(2).plan()
    for name in ("channels", "axis", "eps", "activation", "dtype"):
        with pytest.raises(AttributeError):
            setattr(plan, name, 1)


def test_layers_without_a_plan() -> None:
    with pytest.raises(ValueError, match=r"^plan: got a layer without running statistics; allowed: "):
        fastbn.BatchNorm(2, track_running_stats=False).plan()
    bn = fastbn.BatchNorm(2)
    bn.running_mean = np.array([1 + 2.0**-30, 0])
    with pytest.raises(ValueError, match=r"^running_mean: got values of float64 with more digits; allowed: "):
        bn.plan()
    bn.running_mean = np.array([1.5, 0])
    assert bn.plan().dtype == np.float32
