"""Does what is printed tell what a person wants to know? Shapes and dtypes, conventions, and public names."""

from __future__ import annotations

import copy
import pickle

import cases
import numpy as np

import fastbn


def test_results_show_shapes_and_dtypes() -> None:
    """Not the values of large arrays, and no addresses."""
    c = cases.call((40, 6, 7))
    mask = np.ones((40, 7), bool)
    done = fastbn.forward(c.x, c.gamma, residual=c.residual, activation="relu", mask=mask)
    x = "float32[40, 6, 7]"
    assert repr(done.cache) == f"Cache(x={x}, axis=1, count=280, activation='relu', residual={x})"
    assert repr(done) == f"Forward(y={x}, cache={done.cache!r})"
    got = fastbn.backward(c.dy, done.cache)
    assert repr(got) == f"Gradients(dx={x}, dgamma=float32[6], dbeta=None, dresidual={x})"
    mask[0] = False
    assert repr(fastbn.forward(c.x, mask=mask).cache) == f"Cache(x={x}, axis=1, count=273, mask=bool[40, 7])"
    frozen = fastbn.forward(c.x, None, None, c.running_mean, c.running_var, training=False)
    assert repr(frozen.cache) == f"Cache(x={x}, axis=1, count=280, training=False)"
    ghost = fastbn.forward(c.x, virtual_batch_size=20)
    assert repr(ghost.cache) == f"Cache(x={x}, axis=1, count=[140 140])"


def test_layers_show_the_convention_that_they_were_given() -> None:
    assert repr(fastbn.BatchNorm(3)).startswith("BatchNorm(3, eps=1e-05, momentum=0.1, affine=True")
    keras = fastbn.BatchNorm.keras(3)
    assert repr(keras).startswith("BatchNorm.keras(3, epsilon=0.001, momentum=0.99, affine=True")
    assert repr(fastbn.BatchNorm.onnx(3)).startswith("BatchNorm.onnx(3, epsilon=1e-05, momentum=0.9, affine=True")
    for again in (copy.copy(keras), copy.deepcopy(keras), pickle.loads(pickle.dumps(keras))):
        assert repr(again) == repr(keras)
    assert "correction=1" in repr(fastbn.BatchNorm.keras(3, correction=1))
