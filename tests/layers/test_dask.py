"""Do the blocks of a Dask array give what the array in memory gives, on every scheduler, and within a memory limit?"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest
from test_checks import assert_refused

import fastbn

if find_spec("dask") is None:
    pytest.skip("needs dask", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import dask
    import dask.array as da
    import dask.bag

import fastbn.dask

Array = np.ndarray[Any, Any]
Chunks = tuple[Any, ...]
FLOATS = (*cases.DTYPES, *cases.HALVES)
SHAPE = (7, 6, 5, 4)
CHUNKS: dict[str, Chunks] = {
    "one block": SHAPE,
    "along the batch": (2, 6, 5, 4),
    "along every axis": (3, 2, 2, 3),
    "with empty blocks": ((0, 4, 0, 3), (1, 0, 5), 5, (2, 0, 2)),
}


def in_threads(value: Any) -> Any:
    return value.compute(scheduler="threads", num_workers=2)


def rows_kept(array: da.Array, keep: Array) -> da.Array:
    """These rows, of which Dask does not know how many there are in each block."""
    return array[da.from_array(keep, chunks=(array.chunks[0],))]


# Moments -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_moments(dtype: str, axis: int, chunks: Chunks) -> None:
    """With masks that are cut as the array is, otherwise, or not at all."""
    x = cases.call(SHAPE, dtype, axis, offset=30).x
    array, mask = da.from_array(x, chunks=chunks), cases.random_mask(SHAPE, axis % 4)
    thin = mask[:, :1]
    for m, given in (
        (None, None),
        (mask, mask),
        (mask, da.from_array(mask, chunks=2)),
        (thin, da.from_array(thin, chunks=3)),
        (thin, da.from_array(thin, chunks=(7, (0, 1, 0), 2))),
        (mask[0], mask[0]),
        (np.zeros_like(mask), np.zeros_like(mask)),
    ):
        got = in_threads(fastbn.dask.moments(array, axis=axis, mask=given))
        assert isinstance(got, fastbn.Moments)
        assert (got.dtype, got.channels) == (cases.statistics_dtype(dtype), SHAPE[axis])
        if m is None or m.any():
            cases.assert_moments(got, oracle.forward(x, axis=axis, mask=m), x)
        assert got.count == fastbn.moments(x, axis=axis, mask=m).count


@pytest.mark.parametrize("dtype", FLOATS)
def test_unknown_sizes(any_backend: cases.Kernel, dtype: str) -> None:
    """Of chunks along the batch, some of which turn out to be empty, and along the channels."""
    x, keep = cases.call((12, 6, 5), dtype).x, np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0], bool)
    mask = cases.random_mask(x.shape)
    rows = rows_kept(da.from_array(x, chunks=(3, 2, 5)), keep)
    assert np.isnan(rows.shape[0])
    exact = oracle.forward(x[keep])
    cases.assert_moments(in_threads(fastbn.dask.moments(rows)), exact, x)
    cases.assert_moments(in_threads(fastbn.dask.moments(rows, mask=np.ones((1, 5), bool))), exact, x)
    cut = rows_kept(da.from_array(mask, chunks=(3, 2)), keep)
    got = in_threads(fastbn.dask.moments(rows, mask=cut))
    cases.assert_moments(got, oracle.forward(x[keep], mask=mask[keep]), x)
    got = in_threads(fastbn.dask.moments(rows, axis=0))
    cases.assert_moments(got, oracle.forward(x[keep], axis=0), x)


def test_offset() -> None:
    """Blocks whose means lie far apart, and all of them far from zero: normalized within the contract's bound."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 3, 50)) + 1e6 + 1e3 * (np.arange(40) // 5)[:, None, None]).astype(np.float32)
    array, exact = da.from_array(x, chunks=(5, 2, 20)), oracle.forward(x)
    m = in_threads(fastbn.dask.moments(array))
    cases.assert_moments(m, exact, x)
    cases.assert_y(in_threads(fastbn.dask.infer(array, None, None, m.mean + m.mean_low, m.var(), eps=1e-5)), exact)


def test_no_values() -> None:
    for shape in ((0, 3), (4, 0), (0, 3, 5)):
        got = in_threads(fastbn.dask.moments(da.zeros(shape, dtype=np.float32)))
        assert got == fastbn.moments(np.zeros(shape, np.float32))


# The same bits -------------------------------------------------------------------------------------------------------


def hard(shape: tuple[int, ...] = (64, 5, 33)) -> Array:
    """Values whose moments have other last bits in another order."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 8, (shape[0], 1, 1))


def test_same_bits_everywhere() -> None:
    """On every call, scheduler, number of workers and setting of Dask's own reductions."""
    array = da.from_array(hard(), chunks=(1, 2, 8))
    wanted = fastbn.dask.moments(array).compute(scheduler="sync")
    for workers in (1, 2, 5):
        assert fastbn.dask.moments(array).compute(scheduler="threads", num_workers=workers) == wanted
    with dask.config.set({"split_every": 2, "optimization.fuse.active": True}):
        assert in_threads(fastbn.dask.moments(array)) == wanted
    other = in_threads(fastbn.dask.moments(array.rechunk((64, 5, 1))))
    assert other != wanted, "these data do not tell one order from another"
    cases.assert_moments(other, oracle.forward(hard()), hard())


def test_the_same_call_has_the_same_key() -> None:
    """So that Dask computes it once; and another call has another."""
    array, mask = da.from_array(hard(), chunks=(8, 5, 33)), np.ones((64, 33), bool)
    calls: list[Callable[[], Any]] = [
        lambda: fastbn.dask.moments(array),
        lambda: fastbn.dask.moments(array + 1),
        lambda: fastbn.dask.moments(array, axis=2),
        lambda: fastbn.dask.moments(array, mask=mask),
    ]
    keys = [call().key for call in calls]
    assert keys == [call().key for call in calls]
    assert len(set(keys)) == len(keys)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The verbs that the NumPy backend is asked for, each with its number of threads."""
    from fastbn._backends import numpy_backend

    found: list[tuple[str, int]] = []

    def watched(verb: str, compute: Callable[[Any], None]) -> Callable[[Any], None]:
        def spy(call: Any) -> None:
            found.append((verb, call.threads))
            compute(call)

        return spy

    for verb in ("moments", "infer"):
        monkeypatch.setattr(numpy_backend, verb, watched(verb, getattr(numpy_backend, verb)))
    return found


def test_backend_and_threads(seen: list[tuple[str, int]]) -> None:
    """The backend is that of the call, in Dask's threads, too, each of which computes a block by itself."""
    array, ones = da.from_array(hard(), chunks=(32, 5, 33)), np.ones(5)
    with fastbn.use_backend("numpy"), fastbn.use_num_threads(2):
        lazy = fastbn.dask.moments(array), fastbn.dask.infer(array, None, None, ones, ones)
    for value in lazy:
        in_threads(value)
    assert sorted(seen) == [("infer", 1)] * 2 + [("moments", 1)] * 2


# Inference -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_infer(dtype: str, axis: int, chunks: Chunks) -> None:
    """The bits of the array in memory, which is within the contract's bound."""
    c = cases.call(SHAPE, dtype, axis)
    statistics = c.gamma, c.beta, c.running_mean.astype(np.float64), c.running_var
    array = da.from_array(c.x, chunks=chunks)
    for activation, residual in ((None, None), (("leaky_relu", 0.3), c.residual), ("silu", c.residual)):
        options = {"axis": axis, "activation": activation, "eps": 1e-3}
        given = residual if activation == "silu" or residual is None else da.from_array(residual, chunks=3)
        y = fastbn.dask.infer(array, *statistics, residual=given, **options)
        assert (y.dtype, y.chunks, y.shape) == (c.x.dtype, array.chunks, c.x.shape)
        got = in_threads(y)
        cases.assert_same_bits(got, fastbn.infer(c.x, *statistics, residual=residual, **options))
        exact = oracle.forward(c.x, *statistics, residual=residual, **options)
        cases.assert_y(got, exact, c.gamma, axis=axis, activation=activation)


def test_infer_where_sizes_are_unknown(any_backend: cases.Kernel) -> None:
    c = cases.call((12, 6, 5))
    keep = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0], bool)
    arrays = [rows_kept(da.from_array(a, chunks=(3, 4, 5)), keep) for a in (c.x, c.residual)]
    y = fastbn.dask.infer(arrays[0], c.gamma, c.beta, c.running_mean, c.running_var, residual=arrays[1])
    wanted = fastbn.infer(c.x[keep], *c[3:], residual=c.residual[keep])
    cases.assert_same_bits(in_threads(y), wanted)
    one = rows_kept(da.from_array(c.x, chunks=(12, 4, 5)), keep)
    mean, var = np.zeros(6), np.ones(6)
    y = fastbn.dask.infer(one, None, None, mean, var, axis=0)
    cases.assert_same_bits(in_threads(y), fastbn.infer(c.x[keep], None, None, mean, var, axis=0))


def test_byte_order_and_memory_order() -> None:
    c = cases.call(SHAPE)
    for move in (cases.PLACEMENTS["byteswapped"], cases.PLACEMENTS["channels-last seen as channels-first"]):
        y = fastbn.dask.infer(da.from_array(move(c.x), chunks=(2, 6, 5, 4)), *c[3:])
        assert y.dtype == np.float32
        assert y.dtype.isnative
        cases.assert_same_bits(in_threads(y), fastbn.infer(c.x, *c[3:]))


def test_parameters_are_those_of_the_call() -> None:
    """Though training changes running statistics in place before the result is computed."""
    c = cases.call(SHAPE)
    wanted = fastbn.infer(c.x, *c[3:])
    y = fastbn.dask.infer(da.from_array(c.x, chunks=4), *c[3:])
    for array in c[3:]:
        array[...] = 7
    cases.assert_same_bits(in_threads(y), wanted)


# Errors --------------------------------------------------------------------------------------------------------------


def arrays(**others: Any) -> dict[str, Any]:
    names = ("array", "gamma", "beta", "running_mean", "running_var")
    c = cases.call((6, 4, 5))
    return {**dict(zip(names, (da.from_array(c.x, chunks=(2, 2, 5)), *c[3:]), strict=True)), **others}


UNKNOWN = rows_kept(da.ones((6, 4, 5), chunks=(2, 4, 5), dtype=np.float32), np.ones(6, bool))
LAZY = da.ones((6, 4, 5), chunks=2, dtype=np.float32)
BOTH = (
    ({"array": np.ones((6, 4, 5), np.float32)}, TypeError, ("array", "numpy.ndarray", "from_array")),
    ({"array": None}, TypeError, ("array", "NoneType", "Dask")),
    ({"array": da.ones((6, 4), dtype=np.int64)}, TypeError, ("array", "int64", "bfloat16")),
    ({"array": da.ones((6, 4), chunks=2, dtype=object)}, TypeError, ("array", "object", "bfloat16")),
    ({"array": da.ones(4, dtype=np.float32)}, ValueError, ("array", "(4,)", "2 dimensions")),
    ({"axis": 3}, ValueError, ("axis", "3", "-3 to 2", "array")),
    ({"axis": 1.0}, TypeError, ("axis", "1.0", "integer")),
)
OF_MOMENTS = (
    ({"mask": np.ones((6, 5))}, TypeError, ("mask", "float64", "bool")),
    ({"mask": da.ones((6, 5))}, TypeError, ("mask", "float64", "bool")),
    ({"mask": np.ones((6, 4), bool)}, ValueError, ("mask", "(6, 4)", "(6, 5)", "(6, 4, 5)")),
    ({"mask": np.ones((2, 6, 5), bool)}, ValueError, ("mask", "(2, 6, 5)", "(6, 5)")),
    ({"mask": np.ma.masked_array(np.ones((6, 5), bool))}, TypeError, ("mask", "masked")),
    ({"array": UNKNOWN, "mask": np.ones((6, 5), bool)}, ValueError, ("mask", "1 chunks", "3 chunks", "compute_chunk")),
)
OF_INFER = (
    ({"gamma": np.ones(3)}, ValueError, ("gamma", "(3,)", "(4,)")),
    ({"beta": da.ones(4)}, TypeError, ("beta", "not in memory", "compute()")),
    ({"running_mean": da.ones(4)}, TypeError, ("running_mean", "not in memory", "compute()")),
    ({"running_var": np.ones(5)}, ValueError, ("running_var", "(5,)", "(4,)")),
    ({"running_var": None}, ValueError, ("running_var", "None", "both")),
    ({"running_var": None, "running_mean": None}, ValueError, ("running_mean", "None")),
    ({"eps": -1.0}, ValueError, ("eps", "-1")),
    ({"activation": "tanh"}, ValueError, ("activation", "tanh", "silu")),
    ({"residual": LAZY.astype(np.float64)}, TypeError, ("residual", "float64", "float32")),
    ({"residual": LAZY[:5]}, ValueError, ("residual", "(5, 4, 5)", "(6, 4, 5)")),
    ({"residual": LAZY[0]}, ValueError, ("residual", "(4, 5)", "(6, 4, 5)")),
    ({"array": UNKNOWN, "residual": LAZY[:1]}, ValueError, ("residual", "1 chunks", "3 chunks")),
    ({"array": UNKNOWN, "axis": 0}, ValueError, ("array", "3 chunks", "channel axis", "compute_chunk_sizes")),
)


def named(values: dict[str, Any]) -> str:
    return " ".join(values)


@pytest.mark.parametrize(("values", "error", "words"), (*BOTH, *OF_MOMENTS), ids=str)
def test_moments_refuses(values: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {"array": arrays()["array"], **values}
    assert_refused(fastbn.dask.moments, arguments, error, *words)


@pytest.mark.parametrize(("values", "error", "words"), (*BOTH, *OF_INFER), ids=str)
def test_infer_refuses(values: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    assert_refused(fastbn.dask.infer, arrays(**values), error, *words)


def claimed(block: Any, chunks: Any = ((2, 2, 2), (4,), (5,)), dtype: Any = np.float32) -> da.Array:
    """An array of three blocks, of which Dask believes what it is told."""
    blocks = [da.from_delayed(dask.delayed(block), (2, 4, 5), dtype, meta=np.empty((0, 0, 0), dtype)) for _ in range(3)]
    return da.concatenate(blocks)


def test_blocks_that_are_not_what_the_array_claims() -> None:
    """No block is counted as another one than it is: compute() raises."""
    good = np.ones((2, 4, 5), np.float32)
    statistics = np.ones(4), np.ones(4)
    for block, words in (
        (good.astype(np.float64), ("array", "float64", "float32")),
        (np.ma.masked_array(good), ("array", "MaskedArray")),
        (good.tolist(), ("array", "list")),
    ):
        lazy = claimed(block)
        assert_refused(fastbn.dask.moments(lazy).compute, {}, TypeError, *words)
        assert_refused(fastbn.dask.infer(lazy, None, None, *statistics).compute, {}, TypeError, *words)
    longer, array = claimed(np.ones((3, 4, 5), np.float32)), claimed(good)
    mask = np.ones((6, 5), bool)
    assert_refused(fastbn.dask.moments(longer, mask=mask).compute, {}, ValueError, "mask", "(2, 5)", "(3, 5)")
    y = fastbn.dask.infer(array, None, None, *statistics, residual=longer)
    assert_refused(y.compute, {}, ValueError, "residual", "(3, 4, 5)", "(2, 4, 5)")
    more = claimed(np.ones((2, 5, 5), np.float32))
    y = fastbn.dask.infer(more, None, None, *statistics)
    assert_refused(y.compute, {}, ValueError, "running_mean", "(4,)", "(5,)")


def test_masks_of_unknown_size_are_not_broadcast() -> None:
    """One that keeps a single row of a block is not a mask for all of its rows."""
    x = da.ones((6, 4, 5), chunks=(3, 4, 5), dtype=np.float32)
    mask = rows_kept(da.ones((6, 5), chunks=(3, 5), dtype=bool), np.array([1, 0, 0, 1, 0, 0], bool))
    assert_refused(fastbn.dask.moments(x, mask=mask).compute, {}, ValueError, "mask", "(1, 5)", "(3, 5)")


def test_ranges_of_channels_must_agree() -> None:
    short = da.from_delayed(dask.delayed(np.ones((1, 2))), (2, 2), float, meta=np.empty((0, 0)))
    array = da.concatenate([da.ones((2, 2), chunks=2), short], axis=1)
    assert_refused(fastbn.dask.moments(array).compute, {}, ValueError, "array", "[2, 1]", "chunks")


def test_without_dask(tmp_path: Path) -> None:
    """The message names the extra."""
    script = "import sys; sys.modules['dask'] = None; import fastbn; import fastbn.dask"
    done = cases.run_python(script, tmp_path)
    assert 'pip install "fastbn[dask]"' in done.stderr


# Recalibration -------------------------------------------------------------------------------------------------------


def recalibrated(batches: Any, forward: Any = None) -> fastbn.BatchNorm:
    bn = fastbn.BatchNorm(3, dtype="float64")
    fastbn.recalibrate([bn], batches, (lambda batch: forward(bn, batch)) if forward else bn)
    return bn


def test_recalibrate() -> None:
    """With the blocks of an array, a bag, and collections in any iterable."""
    x = cases.call((12, 3, 5), "float64").x
    array = da.from_array(x, chunks=(5, 2, 2))
    parts = [x[:5], x[5:10], x[10:]]
    wanted = recalibrated(parts)
    pairs = [(da.from_array(part), {"label": i}) for i, part in enumerate(parts)]
    for batches, forward in (
        (array, None),
        (dask.bag.from_sequence(parts, npartitions=2), None),
        (array.rechunk((5, 3, 5)).to_delayed().ravel().tolist(), None),
        ((dask.delayed(part) for part in parts), None),
        (iter(pairs), lambda bn, pair: bn(pair[0])),
        ([{"x": part} for part, _ in pairs], lambda bn, batch: bn(batch["x"])),
        ([iter([part]) for part in parts], lambda bn, batch: bn(*batch)),
    ):
        got = recalibrated(batches, forward)
        cases.assert_same_bits((got.running_mean, got.running_var), (wanted.running_mean, wanted.running_var))


@pytest.mark.parametrize("kind", ["array", "bag", "delayed"])
def test_recalibrate_loads_one_batch_at_a_time(kind: str) -> None:
    events: list[str] = []

    def load(i: int) -> Array:
        events.append(f"load {i}")
        return np.arange(30.0).reshape(2, 3, 5)

    def forward(bn: fastbn.BatchNorm, x: Array) -> None:
        assert type(x) is np.ndarray
        events.append("use")
        bn(x)

    parts = [dask.delayed(load)(i) for i in range(3)]
    if kind == "array":
        batches: Any = da.concatenate([da.from_delayed(part, (2, 3, 5), float) for part in parts])
    else:
        batches = dask.bag.from_sequence(range(3), npartitions=3).map(load) if kind == "bag" else parts
    with dask.config.set(scheduler="sync"):
        recalibrated(batches, forward)
    assert events == ["load 0", "use", "load 1", "use", "load 2", "use"]


def test_recalibrate_refuses() -> None:
    bn = fastbn.BatchNorm(3)
    state = bn.state_dict()
    batches = dask.delayed([np.ones((2, 3))])
    assert_refused(lambda **_: fastbn.recalibrate([bn], batches, bn), state, TypeError, "batches", "Delayed", "bag")
    bad = da.ones((4, 3), chunks=2)  # of float64
    assert_refused(lambda **_: fastbn.recalibrate([bn], bad, bn), state, TypeError, "x", "float64")
    assert bn.training


# Clusters and memory limits ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of two worker processes."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as found:
        yield found


@pytest.mark.parametrize("dtype", FLOATS)
def test_on_a_cluster(client: Any, dtype: str) -> None:
    """The bits of one thread; moments, arrays and masks travel between processes."""
    c = cases.call((16, 5, 9), dtype, offset=30)
    array, mask = da.from_array(c.x, chunks=(3, 2, 4)), cases.random_mask(c.x.shape)
    for m in (None, mask):
        lazy = fastbn.dask.moments(array, mask=m)
        got = lazy.compute()
        assert got == lazy.compute(scheduler=dask.get)
        cases.assert_moments(got, oracle.forward(c.x, mask=m), c.x)
    y = fastbn.dask.infer(array, *c[3:], activation="relu", residual=c.residual)
    cases.assert_same_bits(y.compute(), fastbn.infer(c.x, *c[3:], activation="relu", residual=c.residual))
    bn = fastbn.BatchNorm(5, dtype=dtype)
    fastbn.recalibrate([bn], array, bn)
    cases.assert_sum("running_mean", bn.running_mean, oracle.forward(c.x).mean, np.full(5, 100))


LIMITED = """
import resource
import dask, dask.array as da, numpy as np
import fastbn.dask

used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + (200 << 20),) * 2)
array = da.random.default_rng(0).standard_normal((2400, 64, 32, 32), chunks=(16, 64, 32, 32), dtype=np.float32)
array = array + da.arange(2400, chunks=16, dtype=np.float32)[:, None, None, None]
with dask.config.set(scheduler="threads", num_workers=2):
    m = fastbn.dask.moments(array).compute()
    y = fastbn.dask.infer(array, None, None, m.mean + m.mean_low, m.var())
    found = fastbn.dask.moments(y).compute()
    print(array.nbytes / (200 << 20), m.count, abs(found.mean).max(), abs(found.var() - 1).max())
    try:
        array.compute()
    except MemoryError:
        print("the whole array does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the limits of Linux")
def test_larger_than_memory(tmp_path: Path) -> None:
    """Three times as large, under a limit of the system's that the array in memory would exceed."""
    done = cases.run_python(LIMITED, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    times, count, mean, off = map(float, first.split())
    assert times >= 3
    assert count == 2400 * 1024
    assert mean < 1e-5
    assert off < 1e-4
    assert last == "the whole array does not fit"


EXAMPLES = cases.CHECKOUT / "examples"
in_checkout = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not beside the tests: no checkout")


def run_example(name: str, folder: Path, *arguments: str) -> str:
    script = f"import runpy, sys; sys.argv[1:] = {list(arguments)}; runpy.run_path({str(EXAMPLES / name)!r}, None, "
    done = cases.run_python(script + "'__main__')", folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_checkout
def test_out_of_core_example(tmp_path: Path) -> None:
    """A worker with a third of the memory that the data need."""
    for needed in ("distributed", "zarr"):
        pytest.importorskip(needed)
    printed = run_example("out_of_core.py", tmp_path, "--gigabytes", "0.5", "--limit", "0.17")
    found = re.search(r"y: mean at most (\S+), variance (\S+) to (\S+)", printed)
    assert found, printed
    mean, low, high = map(float, found.groups())
    assert mean < 1e-5
    assert low == pytest.approx(1, rel=1e-4)
    assert high == pytest.approx(1, rel=1e-4)


@in_checkout
def test_federated_example(tmp_path: Path) -> None:
    """It gives the moments of all data, which the average of variances does not."""
    printed = run_example("federated_averages.py", tmp_path)
    found = re.search(r"largest error: (\S+)", printed)
    assert found, printed
    assert float(found[1]) < 1e-12
