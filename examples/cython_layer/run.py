"""Does the layer in Cython give what fastbn gives? To the bit: docs/howto/examples.md has the command."""

from __future__ import annotations

import layer
import numpy as np

import fastbn


def main() -> None:
    """A training step and inference, both ways."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 512, 32), np.float32)
    ours, theirs = layer.Layer(32), fastbn.BatchNorm(32, activation="relu")
    y, dx = ours.forward(x), ours.backward(dy, x)
    same = np.array_equal(y, theirs(x)) and np.array_equal(dx, theirs.backward(dy))
    print(f"a training step: {'the bits of' if same else 'NOT THE SAME AS'} fastbn.BatchNorm")

    batches = rng.standard_normal((10, 64, 32), np.float32)
    wanted = theirs.eval()(batches.reshape(-1, 32)).reshape(batches.shape)
    ours.infer(batches)
    same = np.array_equal(batches, wanted)
    print(f"{len(batches)} batches without the GIL: {'the bits of' if same else 'NOT THE SAME AS'} fastbn.BatchNorm")


if __name__ == "__main__":
    main()
