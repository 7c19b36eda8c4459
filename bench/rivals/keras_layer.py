"""Keras: calls of its BatchNormalization layer."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..problem import EPS, MOMENTUM, Array, Contestant, Problem


class Rival:
    """keras.layers.BatchNormalization, forward and inference, on the backend KERAS_BACKEND or else on torch."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        if find_spec("torch") is not None:
            os.environ.setdefault("KERAS_BACKEND", "torch")
        self._keras: Any = importlib.import_module("keras")
        self._backend = str(self._keras.backend.backend())
        self.version = f"{self._keras.__version__} on {self._backend}"
        if self._backend != "torch":
            self.notes = (f"Keras: {self._backend} chooses the number of threads",)

    def set_threads(self, threads: int) -> None:
        if self._backend == "torch":
            importlib.import_module("torch").set_num_threads(threads)

    def _call(self, problem: Problem, training: bool) -> Callable[[], Any]:
        layer = self._keras.layers.BatchNormalization(
            axis=problem.axis, momentum=1 - MOMENTUM, epsilon=EPS, dtype=problem.dtype
        )
        layer.build(problem.x.shape)
        layer.set_weights([problem.gamma, problem.beta, problem.mean, problem.var])
        call = partial(layer, self._keras.ops.convert_to_tensor(problem.x), training=training)
        if self._backend != "jax":
            return call
        wait = importlib.import_module("jax").block_until_ready
        return lambda: wait(call())

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        if pass_ == "backward" or problem.dtype not in ("float32", "float64"):
            return []

        def results(value: Any) -> tuple[Array, ...]:
            return (problem.channels_first(np.asarray(self._keras.ops.convert_to_numpy(value))),)

        return [Contestant(name="Keras", call=self._call(problem, pass_ == "forward"), results=results)]
