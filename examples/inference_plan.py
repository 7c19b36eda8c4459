"""How is a trained norm called as cheaply as can be? By a plan. Run: python examples/inference_plan.py."""

from __future__ import annotations

import threading
import timeit
from typing import Any

import numpy as np

import fastbn

CHANNELS, REQUESTS, THREADS = 64, 2000, 4


def serve(plan: fastbn.InferencePlan, requests: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> None:
    """Answers one request after another, in memory that it was given: nothing is allocated."""
    for request, answer in zip(requests, found, strict=True):
        plan(request, out=answer)


def microseconds(statement: str, **names: Any) -> float:
    """The best of several runs."""
    return min(timeit.repeat(statement, globals=names, number=2000, repeat=20)) / 2000 * 1e6


def main() -> None:
    """Answers requests from several threads, checks the answers, and times one call."""
    rng = np.random.default_rng(0)
    gamma, beta, mean = rng.standard_normal((3, CHANNELS), np.float32)
    var = rng.uniform(0.5, 2, CHANNELS).astype(np.float32)
    plan = fastbn.InferencePlan(gamma, beta, mean, var, activation="relu")
    print(plan)

    x = rng.standard_normal((THREADS, REQUESTS, 1, CHANNELS), np.float32)
    y = np.empty_like(x)
    workers = [threading.Thread(target=serve, args=(plan, *some)) for some in zip(x, y, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    same = np.array_equal(y, fastbn.infer(x, gamma, beta, mean, var, axis=-1, activation="relu"))
    print(f"{THREADS} threads, {y.size // CHANNELS} calls: {'the bits of' if same else 'NOT THE SAME AS'} fastbn.infer")

    request, out = x[0, 0], np.empty_like(x[0, 0])
    ufuncs = "multiply(x, gamma, out=out); add(out, beta, out=out)"
    usual = microseconds(ufuncs, multiply=np.multiply, add=np.add, x=request, gamma=gamma, beta=beta, out=out)
    planned = microseconds("plan(x, out)", plan=plan, x=request, out=out)
    print(f"a call on {request.shape}: {planned:.2f} us, {planned / usual:.2f} of two NumPy ufuncs ({usual:.2f} us)")


if __name__ == "__main__":
    main()
