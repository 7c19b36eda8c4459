"""How does a norm cost nothing at all? It is folded into the convolution before it: python examples/fold.py."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastbn

Array = np.ndarray[Any, Any]


def convolution(x: Array, weight: Array, bias: Array | None) -> Array:
    """Of images (N, C, H, W) with kernels (out, C, h, w), without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    y: Array = np.einsum("nchwij,ocij->nohw", windows, weight, optimize=True)
    return y if bias is None else y + bias[:, np.newaxis, np.newaxis]


def main() -> None:
    """Runs a convolution and its norm, and then the convolution that includes the norm."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 16, 32, 32), np.float32)
    weight = rng.standard_normal((24, 16, 3, 3), np.float32) / 12
    bn = fastbn.BatchNorm(24)
    for _ in range(20):  # as in training, so that the statistics are those of the convolution's results
        bn(convolution(rng.standard_normal(x.shape, np.float32), weight, None))
    bn.weight[...], bn.bias[...] = rng.uniform(0.5, 2, 24), rng.standard_normal(24)

    w, b = fastbn.fold(weight, None, bn.weight, bn.bias, bn.running_mean, bn.running_var, eps=bn.eps)
    two, one = bn.eval()(convolution(x, weight, None)), convolution(x, w, b)
    print(f"convolution and norm, or one folded convolution: at most {abs(two - one).max():.1e} apart")
    print(f"weight {w.shape} and bias {b.shape} of {w.dtype}")


if __name__ == "__main__":
    main()
