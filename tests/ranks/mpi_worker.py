"""What do the ranks of test_mpi.py run? Started by mpiexec; each keeps what it found in the folder of its argument."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import rank_cases
from mpi4py import MPI
from rank_cases import EPS, MOMENTUM, OF_MPI, SHARES, WORLD, Case, attempt, share_of

import fastbn.mpi


def passes(case: Case, comm: MPI.Intracomm) -> dict[str, Any]:
    """One forward and backward call, on this rank's share."""
    c, mask, mine = case.call(), case.mask(), share_of(comm.rank, comm.size)
    mean, var = c.running_mean.copy(), c.running_var.copy()
    y, cache = fastbn.mpi.forward(
        case.placed(c.x)[mine],
        c.gamma,
        c.beta,
        mean,
        var,
        comm=comm,
        training=case.training,
        momentum=MOMENTUM,
        eps=EPS,
        axis=case.axis,
        mask=None if mask is None else mask[mine],
        activation=case.activation,
        residual=case.placed(c.residual)[mine] if case.residual else None,
        backend=case.backend,
    )
    got = fastbn.mpi.backward(case.placed(c.dy)[mine], cache, comm=comm, backend=case.backend)
    names = dict(zip(("dx", "dgamma", "dbeta"), got, strict=True))
    return {"y": y, **names, "dresidual": got.dresidual, "running_mean": mean, "running_var": var}


def layers(comm: MPI.Intracomm) -> dict[str, Any]:
    """A layer in training and evaluation, its copies and its pickle."""
    c, mine = Case().call(), share_of(comm.rank, comm.size)
    bn = fastbn.mpi.BatchNorm(5, comm=comm, activation="relu", momentum=None)
    found: dict[str, Any] = {"y": [bn(c.x[mine]) for _ in range(2)], "dx": bn.backward(c.dy[mine])}
    found["gradients"], found["state"] = bn.gradients(), bn.state_dict()
    copied = copy.deepcopy(bn)
    found["copy"] = copied.comm is bn.comm and copied.weight is not bn.weight and copied(c.x[mine])
    if comm.size == WORLD:
        found["pickle"] = pickle.loads(pickle.dumps(fastbn.mpi.BatchNorm(5, comm=MPI.COMM_WORLD)))(c.x[mine])
    bn.eval()
    if comm.rank == 0:  # the others communicate nothing
        found["evaluated"] = bn(c.x)
    whole = fastbn.mpi.BatchNorm.keras(5, comm=comm, track_running_stats=False, axis=1).eval()
    found["without running statistics"] = whole(c.x[mine]), whole.backward(c.dy[mine])
    fastbn.recalibrate([copied], [c.x[mine]], copied)
    found["recalibrated"] = copied.running_mean, copied.running_var
    return found


def in_place(comm: MPI.Intracomm) -> dict[str, Any]:
    """out=x and out=dy give the bits of new arrays."""
    c, mine = Case().call(), share_of(comm.rank, comm.size)
    gamma, beta = np.full(5, 2, np.float32), np.ones(5, np.float32)
    x, dy = c.x[mine].copy(), c.dy[mine].copy()
    y, cache = fastbn.mpi.forward(x, gamma, beta, comm=comm, out=x)
    dx = fastbn.mpi.backward(dy, cache, comm=comm, out=dy).dx
    fresh, cache = fastbn.mpi.forward(c.x[mine], gamma, beta, comm=comm)
    wanted = fastbn.mpi.backward(c.dy[mine], cache, comm=comm).dx
    return {"y": y is x and np.array_equal(y, fresh), "dx": dx is dy and np.allclose(dx, wanted, atol=1e-5)}


ON_ONE_RANK: dict[str, dict[str, Any]] = {
    "x of integers": {"x": np.ones((3, 5), int)},
    "x of nothing": {"x": None},
    "x of one axis": {"x": np.ones(5, np.float32)},
    "gamma of another shape": {"gamma": np.ones(4, np.float32)},
    "one running statistic": {"running_var": None},
    "read-only running statistic": {"running_mean": np.frombuffer(bytes(20), np.float32)},
    "momentum": {"momentum": 2.0},
    "correction": {"correction": -1},
    "eps": {"eps": -1.0},
    "axis": {"axis": 7},
    "mask": {"mask": np.ones((2, 2), bool)},
    "activation": {"activation": "tanh"},
    "residual": {"residual": np.ones((2, 2), np.float32)},
    "out": {"out": np.ones((2, 2), np.float32)},
    "backend": {"backend": "fortran"},
    "training": {"training": "yes"},
    "no such argument": {"moment": 0.1},
}
"""A bad argument for one rank."""

ON_ONE_RANK_BACKWARD: dict[str, dict[str, Any]] = {
    "dy of integers": {"dy": np.ones((3, 5), int)},
    "dy of another shape": {"dy": np.ones((30, 5), np.float32)},
    "cache": {"cache": "cache"},
    "out backward": {"out": np.ones((2, 2), np.float32)},
    "backend backward": {"backend": "fortran"},
    "no such argument backward": {"training": False},
}


def errors(comm: MPI.Intracomm) -> dict[Any, Any]:
    """By name and bad rank: what each rank raised. A good call follows each, which a rank that waits would spoil."""
    rank, ranks = comm.rank, comm.size
    x = np.random.default_rng(rank).standard_normal((3 * rank, 5)).astype(np.float32)
    found: dict[Any, Any] = {}

    def forward(**changed: Any) -> Any:
        mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
        given = {"x": x, "running_mean": mean, "running_var": var, **changed}
        outcome = attempt(lambda: fastbn.mpi.forward(comm=comm, **given) and None)
        return outcome if not mean.any() and (var == 1).all() else "running statistics have changed"

    def backward(**changed: Any) -> Any:
        given = {"dy": x, "cache": fastbn.mpi.forward(x, comm=comm).cache, **changed}
        return attempt(lambda: fastbn.mpi.backward(comm=comm, **given) and None)

    for bad in {0, ranks - 1}:
        for name, changed in ON_ONE_RANK.items():
            found[name, bad] = forward(**changed if rank == bad else {})
        for name, changed in ON_ONE_RANK_BACKWARD.items():
            found[name, bad] = backward(**changed if rank == bad else {})
    last = rank == ranks - 1
    bn = fastbn.mpi.BatchNorm(5, comm=comm)
    different: dict[str, Callable[[], Any]] = {
        "eps": lambda: fastbn.mpi.forward(x, comm=comm, eps=1e-3 if last else 1e-5),
        "momentum": lambda: fastbn.mpi.forward(x, comm=comm, momentum=0.5 if last else 0.1),
        "correction": lambda: fastbn.mpi.forward(x, comm=comm, correction=0 if last else 1),
        "channels": lambda: fastbn.mpi.forward(x[:, :4] if last else x, comm=comm),
        "statistics dtype": lambda: fastbn.mpi.forward(x.astype("f8") if last else x, comm=comm),
        "call": lambda: bn(x) if not last else bn.backward(x),
        "nothing": lambda: fastbn.mpi.forward(x[:0], comm=comm),
        "one value": lambda: fastbn.mpi.forward(x[: int(last)], comm=comm),
        "too large a correction": lambda: fastbn.mpi.forward(x, comm=comm, correction=10**6),
        "caches": lambda: fastbn.mpi.backward(x, caches[int(last)], comm=comm),
        "local caches": lambda: fastbn.mpi.backward(local, fastbn.forward(local).cache, comm=comm),
    }
    local = np.ones((4, 5), np.float32)
    caches = [fastbn.mpi.forward(share, comm=comm).cache for share in (x, x if rank else local)]
    for name, call in different.items():
        found[name] = attempt(lambda call=call: call() and None)
    layer, extra = fastbn.mpi.BatchNorm(5, comm=comm), {"inplace": True} if last else {}
    found["layer's arguments"] = attempt(lambda: layer(x, **extra) and None)
    layer(x)
    found["layer's arguments backward"] = attempt(lambda: layer.backward(*[x] * (1 + last)) and None)
    found["layer"] = attempt(lambda: fastbn.mpi.BatchNorm(5, comm=comm)(x[:, :4] if last else x) and None)
    found["uncalled layer"] = attempt(lambda: fastbn.mpi.BatchNorm(5, comm=comm).backward(x) and None)
    found["after all"] = fastbn.mpi.forward(x, comm=comm).cache.count
    return found


def main(folder: str) -> None:
    world, results = MPI.COMM_WORLD, {}
    for ranks in SHARES:
        comm = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
        if comm == MPI.COMM_NULL:
            results["no communicator"] = attempt(lambda comm=comm: fastbn.mpi.forward(np.ones((2, 2)), comm=comm))
            continue
        for name, case in OF_MPI.items():
            results[ranks, name] = [passes(case, comm) for _ in range(2)]
        results[ranks, "layers"] = layers(comm)
        results[ranks, "in place"] = in_place(comm)
        if ranks > 1:
            results[ranks, "errors"] = errors(comm)
    rank_cases.keep(folder, world.rank, results)


if __name__ == "__main__":
    main(sys.argv[1])
