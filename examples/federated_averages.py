"""How are running statistics averaged over clients that keep their data? As moments, which count what each has seen.

    python examples/federated_averages.py

Averaging the running variances would lose the variance between the clients. Here it is included, and a client with
more data weighs more: the result is that of all data in one place (Chan, Golub & LeVeque 1983).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import fastbn

CHANNELS = 3


def report_of(data: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """What a client sends: how many values per channel it has, and its layer's running statistics, made exact."""
    bn = fastbn.BatchNorm(CHANNELS, dtype="float64")
    fastbn.recalibrate([bn], np.array_split(data, 4), bn)
    return data.size // CHANNELS, bn.running_mean, bn.running_var


def averaged(reports: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> fastbn.Moments:
    """The moments of the data of all clients. A running variance is over count - 1."""
    return sum(fastbn.Moments(count, mean, var * (count - 1)) for count, mean, var in reports)


def main() -> None:
    """Three clients, whose data differ in size and in their means."""
    rng = np.random.default_rng(0)
    clients = [rng.standard_normal((n, CHANNELS, 8, 8)) + 5 * i for i, n in enumerate((40, 200, 8))]
    reports = [report_of(data) for data in clients]
    total, exact = averaged(reports), fastbn.moments(np.concatenate(clients))
    plain = np.mean([var for _, _, var in reports], axis=0)
    print(f"all data:    mean {exact.mean}, variance {exact.var(1)}")
    print(f"as moments:  mean {total.mean}, variance {total.var(1)}")
    print(f"averaged variances, without that between the clients: {plain}")
    print(f"largest error: {max(abs(total.mean - exact.mean).max(), abs(total.var(1) - exact.var(1)).max()):.1e}")


if __name__ == "__main__":
    main()
