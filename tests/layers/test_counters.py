"""Are counts that an int64 cannot hold refused, with nothing changed, wherever something counts?"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest

import fastbn

MOST = 2**63 - 1


def with_moments(count: int) -> fastbn.Moments:
    return fastbn.Moments(count, np.zeros(3), np.ones(3))


def with_sums(count: int) -> fastbn.Sums:
    return fastbn.Sums(count, np.zeros(3), np.ones(3))


@pytest.mark.parametrize("make", [with_moments, with_sums])
def test_counts_of_parts(make: Any) -> None:
    """Their sum, as well as each."""
    assert (make(MOST - 1) + make(1)).count == MOST
    assert (make(MOST) + make(0)).count == MOST
    for add in (lambda: make(MOST) + make(1), lambda: sum([make(2**62), make(2**62)]), lambda: make(2**63)):
        with pytest.raises(ValueError, match=rf"^count: got {2**63}; allowed: an integer from 0 to 2\*\*63 - 1"):
            add()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("virtual", [None, 2])
def test_batches_of_a_layer(kernel: cases.Kernel, momentum: float | None, virtual: int | None) -> None:
    bn = fastbn.BatchNorm(3, momentum=momentum, virtual_batch_size=virtual)
    x = cases.call((4, 3)).x
    bn.num_batches_tracked = MOST - 1
    bn(x)
    assert bn.num_batches_tracked == bn.state_dict()["num_batches_tracked"] == MOST
    before, cache, out = bn.state_dict(), bn._cache, np.zeros_like(x)
    with pytest.raises(ValueError, match=rf"^num_batches_tracked: got {MOST} before another batch; allowed: "):
        bn(x, out=out)
    cases.assert_same_bits(tuple(bn.state_dict().values()), tuple(before.values()))
    assert bn._cache is cache
    assert not out.any()
    assert bn.eval()(x).shape == x.shape
    bn.train().reset_parameters()
    bn(x)
    assert bn.num_batches_tracked == 1


def test_recalibration_does_not_count_batches() -> None:
    """So the counter may be the largest, and stays what it is."""
    bn, x = fastbn.BatchNorm(3), cases.call((4, 3)).x
    bn.num_batches_tracked = MOST
    fastbn.recalibrate([bn], [x, x], bn)
    assert bn.num_batches_tracked == MOST
    np.testing.assert_allclose(bn.running_mean, x.mean(axis=0), atol=1e-6)
