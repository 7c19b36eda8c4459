"""Is a batch whose shares several MPI ranks have normalized as by one process, and does an error reach all of them?"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import rank_cases
from rank_cases import OF_MPI, SHARES, Case, assert_all_raise, assert_told

import fastbn

WORKER = Path(__file__).with_name("mpi_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank of one start found."""
    command, environment = rank_cases.mpiexec()

    def start(folder: Path) -> None:
        ranks = [*command, "-n", str(rank_cases.WORLD), *rank_cases.python("-m", "mpi4py", WORKER, folder)]
        rank_cases.run([ranks], **environment)

    return rank_cases.started(tmp_path_factory, "mpi", start)


@pytest.fixture(params=SHARES)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def of(results: list[dict[Any, Any]], ranks: int, name: str) -> list[Any]:
    """What the first `ranks` ranks found."""
    return [found[ranks, name] for found in results[:ranks]]


def test_results(results: list[dict[Any, Any]], ranks: int) -> None:
    """Each case's, and the same bits again in a second run."""
    for name, case in OF_MPI.items():
        runs, where = of(results, ranks, name), f"({name}, {ranks} ranks)"
        rank_cases.assert_right(case, [first for first, _ in runs], where, local=False)
        if case.training:
            rank_cases.assert_building_blocks(case, [first for first, _ in runs], where)
        for first, second in runs:
            for key, value in first.items():
                cases.assert_same_bits(value, second[key], f"{key} {where}")


def test_layers(results: list[dict[Any, Any]], ranks: int) -> None:
    """They are a layer of one process: what it returns, its gradients, its state, its copies, its exact statistics."""
    c, found = Case().call(), of(results, ranks, "layers")
    bn = fastbn.BatchNorm(5, activation="relu", momentum=None)
    y = [bn(c.x) for _ in range(2)][1]
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(np.concatenate([one["y"][1] for one in found]), y, **close)
    np.testing.assert_allclose(np.concatenate([one["copy"] for one in found]), y, **close)
    np.testing.assert_allclose(np.concatenate([one["dx"] for one in found]), bn.backward(c.dy), **close)
    for one in found:
        for name, gradient in bn.gradients().items():
            np.testing.assert_allclose(one["gradients"][name], gradient, **close)
            cases.assert_same_bits(one["gradients"][name], found[0]["gradients"][name])
        for name, array in bn.state_dict().items():
            np.testing.assert_allclose(one["state"][name], array, **close)
            cases.assert_same_bits(one["state"][name], found[0]["state"][name])
    np.testing.assert_allclose(found[0]["evaluated"], bn.eval()(c.x), **close)
    moments = fastbn.moments(c.x)
    for one in found:
        np.testing.assert_allclose(one["recalibrated"][0], moments.mean, **close)
        np.testing.assert_allclose(one["recalibrated"][1], moments.var(correction=1), **close)


def test_layers_without_running_statistics(results: list[dict[Any, Any]], ranks: int) -> None:
    """They use those of all ranks after eval(), too."""
    c, found = Case().call(), of(results, ranks, "layers")
    bn = fastbn.BatchNorm.keras(5, track_running_stats=False, axis=1).eval()
    for place, wanted in enumerate((bn(c.x), bn.backward(c.dy))):
        got = np.concatenate([one["without running statistics"][place] for one in found])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_pickle_keeps_the_communicator(results: list[dict[Any, Any]]) -> None:
    y = np.concatenate([one["pickle"] for one in of(results, rank_cases.WORLD, "layers")])
    np.testing.assert_allclose(y, fastbn.BatchNorm(5)(Case().call().x), rtol=1e-5, atol=1e-6)


def test_in_place(results: list[dict[Any, Any]], ranks: int) -> None:
    for found in of(results, ranks, "in place"):
        assert found == {"y": True, "dx": True}


ON_ONE_RANK = {
    "x of integers": ("TypeError", "x: got dtype int64"),
    "x of nothing": ("TypeError", "x: got dtype object"),
    "x of one axis": ("ValueError", r"x: got shape \(5,\)"),
    "gamma of another shape": ("ValueError", "gamma: got shape"),
    "one running statistic": ("ValueError", "running_var: got None beside running_mean"),
    "read-only running statistic": ("ValueError", "running_mean: got a read-only array"),
    "momentum": ("ValueError", "momentum: got 2.0"),
    "correction": ("ValueError", "correction: got -1"),
    "eps": ("ValueError", "eps: got -1.0"),
    "axis": ("ValueError", "axis: got 7"),
    "mask": ("ValueError", "mask: got shape"),
    "activation": ("ValueError", "activation: got 'tanh'"),
    "residual": ("ValueError", "residual: got shape"),
    "out": ("ValueError", "out: got shape"),
    "backend": ("ValueError", "backend: got 'fortran'"),
    "training": ("TypeError", "training: got 'yes'"),
    "no such argument": ("TypeError", r"forward\(\) got an unexpected keyword argument 'moment'"),
    "dy of integers": ("TypeError", "dy: got dtype int64"),
    "dy of another shape": ("ValueError", "dy: got shape"),
    "cache": ("TypeError", "cache: got 'cache'"),
    "out backward": ("ValueError", "out: got shape"),
    "backend backward": ("ValueError", "backend: got 'fortran'"),
    "no such argument backward": ("TypeError", r"backward\(\) got an unexpected keyword argument 'training'"),
}
ON_ALL = {
    "eps": ("ValueError", r"eps: got 1e-05 on rank 0 and 0.001 on rank \d; allowed: the same on every rank"),
    "momentum": ("ValueError", r"momentum: got 0.1 on rank 0 and 0.5 on rank \d"),
    "correction": ("ValueError", r"correction: got 1 on rank 0 and 0 on rank \d"),
    "channels": ("ValueError", r"x: got 5 channels on rank 0 and 4 channels on rank \d"),
    "statistics dtype": ("TypeError", r"x: got the statistics dtype float32 on rank 0 and the .* float64 on rank \d"),
    "call": ("RuntimeError", ".*the layer has not been called yet"),
    "nothing": ("ValueError", "x: got 0 values per channel on all ranks together; allowed: 2 or more to train"),
    "one value": ("ValueError", "x: got 1 value per channel on all ranks together"),
    "too large a correction": ("ValueError", "correction: got 1000000 with M = "),
    "caches": ("ValueError", r"the cache's count: got \d+ on rank 0 and \d+ on rank \d"),
    "local caches": ("ValueError", r"cache: got a count of 4, where all ranks together have \d+ values per channel"),
    "layer's arguments": ("TypeError", r".*__call__\(\) got an unexpected keyword argument 'inplace'"),
    "layer's arguments backward": ("TypeError", r".*backward\(\) too many positional arguments"),
    "layer": ("ValueError", ".*x: got shape .* with 4 channels; allowed: the layer's 5 channels"),
    "uncalled layer": ("RuntimeError", ".*the layer has not been called yet"),
}


def test_an_error_on_one_rank_raises_on_all(results: list[dict[Any, Any]], ranks: int) -> None:
    """With its class and text, and nothing has changed; the last call of all shows that none has fallen behind."""
    if ranks == 1:
        return
    found = of(results, ranks, "errors")
    for bad in {0, ranks - 1}:
        for name, (kind, text) in ON_ONE_RANK.items():
            assert_told([one[name, bad] for one in found], bad, kind, text)
    assert sum(isinstance(name, tuple) for name in found[0]) == 2 * len(ON_ONE_RANK)
    for name, (kind, text) in ON_ALL.items():
        outcomes = [one[name] for one in found]
        if name.startswith(("call", "layer", "uncalled layer")):  # the error of one rank, whose number the others tell
            for outcome in outcomes:
                assert outcome[0] == kind and re.match(text, outcome[1]), outcome
        else:
            assert_all_raise(outcomes, kind, text)
    assert {one["after all"] for one in found} == {3 * sum(range(ranks))}


def test_a_process_outside_the_communicator(results: list[dict[Any, Any]]) -> None:
    kind, text = results[-1]["no communicator"]
    assert kind == "ValueError"
    assert text.startswith("comm: got MPI.COMM_NULL; allowed: ")


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which is one rank."""
    for name, value in rank_cases.mpiexec()[1].items():
        monkeypatch.setenv(name, value)
    module = pytest.importorskip("fastbn.mpi")
    comm = importlib.import_module("mpi4py.MPI").COMM_SELF
    with pytest.raises(TypeError, match=r"comm: got None .*; allowed: an mpi4py.MPI.Intracomm"):
        module.BatchNorm(3, comm=None)
    with pytest.raises(TypeError, match=r"comm: got 'world'"):
        module.forward(np.ones((2, 2)), comm="world")
    with pytest.raises(TypeError, match=r"comm: got 'world'"):
        module.backward(np.ones((2, 2)), None, comm="world")
    bn = module.BatchNorm(3, comm=comm)
    with pytest.raises(ValueError, match=r"virtual_batch_size: got 4; allowed: None, since all ranks share"):
        bn.virtual_batch_size = 4
    with pytest.raises(ValueError, match="virtual_batch_size: got 2; allowed: None"):
        module.BatchNorm(3, comm=comm, virtual_batch_size=2)
    with pytest.raises(TypeError, match="comm: got None"):
        bn.comm = None
    with pytest.raises(TypeError, match=r"forward\(\) missing a required (keyword-only )?argument: 'comm'"):
        module.forward(np.ones((2, 2)))
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'moment'"):
        module.forward(np.ones((2, 2)), comm=comm, training=False, moment=0.1)
    assert repr(bn) == f"fastbn.mpi.{fastbn.BatchNorm(3)!r}"


@pytest.mark.parametrize("missing", ["mpi4py", "the MPI"])
def test_without_mpi(missing: str, tmp_path: Path) -> None:
    """`import fastbn` works, and the extra is named."""
    script = "import sys; sys.modules['mpi4py'] = None; import fastbn; print('there'); import fastbn.mpi"
    if missing == "the MPI":
        pytest.importorskip("mpi4py")
        script = script.replace("sys.modules['mpi4py'] = None", "import os; os.environ['MPI4PY_LIBMPI'] = '/nowhere'")
    done = cases.run_python(script, tmp_path)
    assert 'ImportError: fastbn.mpi needs mpi4py and an MPI: pip install "fastbn[mpi]"' in done.stderr
    assert done.stdout == "there\n"


@pytest.mark.skipif(not rank_cases.EXAMPLES.is_dir(), reason="examples are not beside the tests: no checkout")
def test_example() -> None:
    pytest.importorskip("sklearn")
    command, environment = rank_cases.mpiexec()
    script = rank_cases.python("-m", "mpi4py", rank_cases.EXAMPLES / "data_parallel_mpi.py")
    rank_cases.assert_example(rank_cases.run([[*command, "-n", "2", *script]], **environment))
