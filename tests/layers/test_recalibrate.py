"""Does recalibration give the statistics of all data, exactly? (Wu & Johnson 2021, precise batch norm)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]


def batches(dtype: str = "float32", sizes: tuple[int, ...] = (6, 3, 1, 10)) -> list[Array]:
    """Of different sizes, about different means: most of the variance is between them."""
    return [cases.call((n, 5, 3), dtype, offset=20 * i, seed=i).x for i, n in enumerate(sizes)]


def state_of(bn: fastbn.BatchNorm) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in bn.state_dict().items()}


@pytest.mark.parametrize("dtype", (*cases.DTYPES, *cases.HALVES))
@pytest.mark.parametrize("make", [fastbn.BatchNorm, fastbn.BatchNorm.keras], ids=["torch", "keras"])
def test_statistics_of_all_data(any_backend: cases.Kernel, dtype: str, make: Any) -> None:
    """In the layer's convention: the variance over M - 1, or over M."""
    bn = make(5, axis=1, dtype=dtype)
    bn(cases.call((6, 5, 3), dtype, offset=-100).x)
    data = batches(dtype)
    fastbn.recalibrate([bn], data, bn)
    whole = np.concatenate(data)
    exact = oracle.forward(whole)
    var = oracle.unbiased(exact.var, exact.count) if make is fastbn.BatchNorm else exact.var
    cases.assert_sum("running_mean", bn.running_mean, exact.mean, np.full(5, 100))
    cases.assert_sum("running_var", bn.running_var, var, 10 * var)


def test_several_layers(any_backend: cases.Kernel) -> None:
    """Each with the inputs that it sees while the ones before it normalize with batch statistics."""
    first, second = fastbn.BatchNorm(5, dtype="float64", activation="relu"), fastbn.BatchNorm(5, dtype="float64")
    weight = np.random.default_rng(0).standard_normal((5, 5))

    def network(x: Array) -> Array:
        return second(np.moveaxis(np.moveaxis(first(x), 1, -1) @ weight, -1, 1))

    data = batches("float64", sizes=(6, 3, 10))
    fastbn.recalibrate([first, second], data, network)
    seen = [np.moveaxis(fastbn.forward(x, activation="relu").y, 1, -1) @ weight for x in data]
    whole = np.concatenate(seen).reshape(-1, 5)
    np.testing.assert_allclose(second.running_mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(second.running_var, whole.var(axis=0, ddof=1), rtol=1e-12)


def test_a_layer_that_is_called_twice_a_batch(any_backend: cases.Kernel) -> None:
    """All that it sees counts."""
    bn = fastbn.BatchNorm(5, dtype="float64")
    data = batches("float64", sizes=(6, 3))

    def siamese(x: Array) -> None:
        bn(x)
        bn(2 * x)

    fastbn.recalibrate([bn, bn], data, siamese)
    whole = np.concatenate(data + [2 * x for x in data])
    np.testing.assert_allclose(bn.running_mean, whole.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, whole.var(axis=(0, 2), ddof=1), rtol=1e-12)


def test_virtual_batches_count_together(any_backend: cases.Kernel) -> None:
    bn = fastbn.BatchNorm(5, dtype="float64", virtual_batch_size=3)
    data = batches("float64", sizes=(6, 4))
    fastbn.recalibrate([bn], data, bn)
    whole = np.concatenate(data)
    np.testing.assert_allclose(bn.running_mean, whole.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, whole.var(axis=(0, 2), ddof=1), rtol=1e-12)


def test_nothing_else_changes(any_backend: cases.Kernel) -> None:
    """Mode, count of batches, parameters and momentum are as before, in training or not."""
    for training in (True, False):
        bn = fastbn.BatchNorm(5, momentum=0.25)
        bn(batches()[0])
        bn.train(training)
        before = state_of(bn)
        fastbn.recalibrate([bn], iter(batches()), bn)
        after = state_of(bn)
        assert bn.training is training
        assert bn.momentum == 0.25
        for name in ("weight", "bias", "num_batches_tracked"):
            assert after[name] == before[name]
        assert after["running_var"] != before["running_var"]


def test_the_layer_trains_on_as_if_nothing_had_been(any_backend: cases.Kernel) -> None:
    bn = fastbn.BatchNorm(5)
    fastbn.recalibrate([bn], batches(), bn)
    mean = bn.running_mean.copy()
    x = batches()[0]
    bn(x)
    np.testing.assert_allclose(bn.running_mean, 0.9 * mean + 0.1 * x.mean(axis=(0, 2)), rtol=1e-5)


def test_batches_may_be_anything(any_backend: cases.Kernel) -> None:
    """A generator of pairs, of which the function takes one half."""
    bn = fastbn.BatchNorm(5, dtype="float64")

    def pairs() -> Iterator[tuple[Array, str]]:
        for x in batches("float64"):
            yield x, "label"

    fastbn.recalibrate([bn], pairs(), lambda pair: bn(pair[0]))
    np.testing.assert_allclose(bn.running_mean, np.concatenate(batches("float64")).mean(axis=(0, 2)), rtol=1e-12)


def _broken(x: Array) -> None:
    raise RuntimeError("no such thing")


def test_what_fails_changes_nothing() -> None:
    """Neither the layers before nor the mode, wherever it fails."""
    bn = fastbn.BatchNorm(5).eval()
    bn(batches()[0])
    idle = fastbn.BatchNorm(5)
    untracked = fastbn.BatchNorm(5, track_running_stats=False)
    before = state_of(bn)

    def fails_late(x: Array) -> None:
        bn(x)
        if len(x) == 10:
            raise RuntimeError("no such thing")

    for layers, data, forward, error, words in (
        ([bn], batches(), _broken, RuntimeError, "no such thing"),
        ([bn], batches(), fails_late, RuntimeError, "no such thing"),
        ([bn, idle], batches(), bn, ValueError, "layers"),
        ([bn], [], bn, ValueError, "layers|batches"),
        ([bn, untracked], batches(), bn, ValueError, "layers"),
        ([bn, "bn"], batches(), bn, TypeError, "layers"),
        (bn, batches(), bn, TypeError, "layers|iterable"),
    ):
        with pytest.raises(error, match=words):
            fastbn.recalibrate(layers, data, forward)
        assert state_of(bn) == before
        assert bn.training is False
        assert idle.training is True
