"""What are the demo's networks and data, and how are they trained? In NumPy and fastbn; all arrays are channels-last.

A layer has the interface of fastbn.BatchNorm: call it, then `backward`, then read `parameters()` and `gradients()`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..config.thread_count import set_num_threads, use_num_threads
from ..layer import BatchNorm

Array = np.ndarray[Any, Any]
MOMENTUM = 0.9
CLASSES = 10
BATCH = 64


class Layer(Protocol):
    def __call__(self, x: Array) -> Array: ...
    def backward(self, dy: Array) -> Array: ...
    def parameters(self) -> dict[str, Array]: ...
    def gradients(self) -> dict[str, Array]: ...


class Dense:
    """y = x @ weight + bias. The bias is left out if batch norm follows, which would subtract it."""

    def __init__(self, weight: Array, bias: bool) -> None:
        self.weight = weight
        self.bias = np.zeros(weight.shape[1], weight.dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        self._x = x
        y = x @ self.weight
        return y if self.bias is None else np.add(y, self.bias, out=y)

    def backward(self, dy: Array) -> Array:
        self._dy = dy
        return dy @ self.weight.T

    def parameters(self) -> dict[str, Array]:
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def gradients(self) -> dict[str, Array]:
        gradients = {"weight": self._x.T @ self._dy}
        return gradients if self.bias is None else {**gradients, "bias": self._dy.sum(axis=0)}


class Conv:
    """A 3 x 3 convolution, zero-padded by 1: im2col, then Dense on the 9 * channels values of each window."""

    def __init__(self, weight: Array, bias: bool, stride: int = 1) -> None:
        self._dense = Dense(weight, bias)
        self._stride = stride

    def __call__(self, x: Array) -> Array:
        count, height, width, channels = x.shape
        padded = np.zeros((count, height + 2, width + 2, channels), x.dtype)
        padded[:, 1:-1, 1:-1] = x
        shape = (count, -(-height // self._stride), -(-width // self._stride))
        windows = np.empty((*shape, 3, 3, channels), x.dtype)
        self._shapes = padded.shape, windows.shape
        for i, j, at in self._shifts():
            windows[:, :, :, i, j] = padded[at]
        return self._dense(windows.reshape(-1, 9 * channels)).reshape(*shape, -1)

    def backward(self, dy: Array) -> Array:
        padded, windows = self._shapes
        dwindows = self._dense.backward(dy.reshape(-1, dy.shape[3])).reshape(windows)
        dx = np.zeros(padded, dy.dtype)
        for i, j, at in self._shifts():
            dx[at] += dwindows[:, :, :, i, j]
        return dx[:, 1:-1, 1:-1]

    def _shifts(self) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """The element (i, j) of a window, and where it is in the padded image for all windows."""
        _, rows, columns = self._shapes[1][:3]
        for i in range(3):
            for j in range(3):
                down = slice(i, i + self._stride * rows, self._stride)
                across = slice(j, j + self._stride * columns, self._stride)
                yield i, j, (slice(None), down, across)

    def parameters(self) -> dict[str, Array]:
        return self._dense.parameters()

    def gradients(self) -> dict[str, Array]:
        return self._dense.gradients()


class _WithoutParameters:
    def parameters(self) -> dict[str, Array]:
        return {}

    def gradients(self) -> dict[str, Array]:
        return {}


class Relu(_WithoutParameters):
    def __call__(self, x: Array) -> Array:
        self._y = np.maximum(x, 0)
        return self._y

    def backward(self, dy: Array) -> Array:
        return dy * (self._y > 0)


class Sigmoid(_WithoutParameters):
    def __call__(self, x: Array) -> Array:
        self._y = 0.5 + 0.5 * np.tanh(0.5 * x)
        return self._y

    def backward(self, dy: Array) -> Array:
        return dy * self._y * (1 - self._y)


class Reshape(_WithoutParameters):
    """Gives each example another shape."""

    def __init__(self, *shape: int) -> None:
        self._shape = shape

    def __call__(self, x: Array) -> Array:
        self._before = x.shape
        return x.reshape(len(x), *self._shape)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self._before)


class Network:
    """A sequence of layers."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> None:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def parameters(self) -> list[Array]:
        return [value for layer in self.layers for value in layer.parameters().values()]

    def gradients(self) -> list[Array]:
        return [value for layer in self.layers for value in layer.gradients().values()]

    def train(self, mode: bool = True) -> None:
        for layer in self.layers:
            if isinstance(layer, BatchNorm):
                layer.train(mode)

    def accuracy(self, x: Array, labels: Array) -> float:
        """The share of correct answers, in inference with the running statistics."""
        self.train(False)
        right = np.argmax(self(x), axis=1) == labels
        self.train()
        return float(right.mean())


class Builder:
    """Draws the weights, which are the same with and without batch norm, and adds batch norm if `norm` is true."""

    def __init__(self, norm: bool, seed: int, scale: float, dtype: str) -> None:
        self.norm = norm
        self._rng = np.random.default_rng([seed, 0])
        self._scale = scale
        self._dtype = dtype

    def weight(self, fan_in: int, fan_out: int, gain: float) -> Array:
        std = self._scale * np.sqrt(gain / fan_in)
        return np.asarray(std * self._rng.standard_normal((fan_in, fan_out)), self._dtype)

    def relu(self, units: int) -> list[Layer]:
        return [BatchNorm(units, axis=-1, activation="relu", dtype=self._dtype)] if self.norm else [Relu()]

    def sigmoid(self, units: int) -> list[Layer]:
        return [BatchNorm(units, axis=-1, dtype=self._dtype), Sigmoid()] if self.norm else [Sigmoid()]

    def output(self, fan_in: int) -> Layer:
        return Dense(self.weight(fan_in, CLASSES, 1), True)


def _shallow(new: Builder) -> list[Layer]:
    return [Dense(new.weight(64, 64, 2), not new.norm), *new.relu(64), new.output(64)]


def _deep(new: Builder) -> list[Layer]:
    layers: list[Layer] = []
    for fan_in in (64, 32, 32, 32, 32, 32):
        layers += [Dense(new.weight(fan_in, 32, 1), not new.norm), *new.sigmoid(32)]
    return [*layers, new.output(32)]


def _convolutional(new: Builder) -> list[Layer]:
    return [
        Reshape(8, 8, 1),
        *(Conv(new.weight(9, 8, 2), not new.norm, stride=2), *new.relu(8)),
        *(Conv(new.weight(72, 16, 2), not new.norm), *new.relu(16)),
        Reshape(256),
        new.output(256),
    ]


@dataclass(frozen=True)
class Kind:
    """One of the demo's networks. After `steps` steps, the accuracy of every network that learns has settled."""

    title: str
    layers: str
    steps: int
    build: Callable[[Builder], list[Layer]]


KINDS = {
    "shallow": Kind("Shallow ReLU network", "Dense(64) - ReLU - Dense(10)", 240, _shallow),
    "deep": Kind("Deep sigmoid network", "6 x (Dense(32) - sigmoid) - Dense(10)", 180, _deep),
    "conv": Kind("Convolutional network", "Conv(8) - ReLU - Conv(16) - ReLU - Dense(10)", 110, _convolutional),
}


def build(kind: str, norm: bool, *, seed: int = 0, scale: float = 1.0, dtype: str = "float32") -> Network:
    """A new network. The standard deviation of its weights is `scale` times that of He or LeCun."""
    return Network(KINDS[kind].build(Builder(norm, seed, scale, dtype)))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean loss after softmax, and its gradient."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float((np.log(sums[:, 0]) - shifted[rows, labels]).mean())
    gradient = exponentials / sums
    gradient[rows, labels] -= 1
    gradient /= np.asarray(len(labels), logits.dtype)
    return loss, gradient


@dataclass(frozen=True)
class Data:
    """Images (examples, 64) and labels, in three parts: for training, for choosing a learning rate, and to report."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


@dataclass(frozen=True)
class Run:
    """What a training run gave: test accuracy at each checkpoint, validation accuracy at the end, gradient norm."""

    curve: Array
    validation: float
    gradient_norm: float
    """The norm of the first layer's gradient in the first step."""


def batches(examples: int, size: int, seed: int) -> Iterator[Array]:
    """Indices of batches, without end, in a new order each epoch, which is the same with and without batch norm."""
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(examples)
        for start in range(0, examples - size + 1, size):
            yield order[start : start + size]


class Momentum:
    """Stochastic gradient descent with momentum."""

    def __init__(self, network: Network, rate: float) -> None:
        self._network = network
        self._rate = rate
        self._velocities = [np.zeros_like(parameter) for parameter in network.parameters()]

    def step(self, x: Array, labels: Array) -> float:
        """Makes a step, and returns the loss before it."""
        loss, gradient = cross_entropy(self._network(x), labels)
        self._network.backward(gradient)
        parameters, gradients = self._network.parameters(), self._network.gradients()
        for parameter, velocity, gradient in zip(parameters, self._velocities, gradients, strict=True):
            velocity *= MOMENTUM
            velocity -= self._rate * gradient
            parameter += velocity
        return loss


def train(network: Network, data: Data, rate: float, batch: int, seed: int, checkpoints: Sequence[int]) -> Run:
    """Trains up to the last checkpoint, or until the loss is not finite, after which nothing can change."""
    images, labels = data.train
    optimizer = Momentum(network, rate)
    curve: list[float] = []
    gradient_norm = 0.0
    with np.errstate(all="ignore"):
        for step, chosen in enumerate(batches(len(images), batch, seed), 1):
            loss = optimizer.step(images[chosen], labels[chosen])
            if step == 1:
                gradient_norm = float(np.linalg.norm(network.gradients()[0]))
            if step in checkpoints or not np.isfinite(loss):
                curve.append(network.accuracy(*data.test))
            if step == checkpoints[-1] or not np.isfinite(loss):
                break
        curve += [curve[-1]] * (len(checkpoints) - len(curve))
        return Run(np.array(curve), network.accuracy(*data.validation), gradient_norm)


@dataclass(frozen=True)
class Job:
    """One training run."""

    kind: str
    norm: bool
    rate: float
    steps: int
    scale: float = 1.0
    batch: int = BATCH
    curve: bool = False
    seed: int = 0

    def checkpoints(self) -> list[int]:
        """The steps after which to test: evenly on a logarithmic scale for a curve, otherwise only the last."""
        return sorted({round(step) for step in np.geomspace(self.steps, min(self.steps, 3), 60 if self.curve else 1)})


def extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'fastbn demo needs {module}, which is not installed: pip install "fastbn[demo]"') from error


def load_data() -> Data:
    """scikit-learn's 1797 digits of 8 x 8, always in the same parts: 1024 to train, 273 to validate, 500 to test."""
    digits = extra("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.data[order].astype(np.float32), digits.target[order]
    images = (images - images[:1024].mean()) / images[:1024].std()
    train_part, validation, test = (slice(0, 1024), slice(1024, 1297), slice(1297, None))
    return Data(*((images[part], labels[part]) for part in (train_part, validation, test)))


def perform(job: Job, data: Data) -> Run:
    network = build(job.kind, job.norm, seed=job.seed, scale=job.scale)
    return train(network, data, job.rate, job.batch, job.seed, job.checkpoints())


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits fastbn and NumPy's BLAS to one thread, since the networks are too small for more."""
    with use_num_threads(1), extra("threadpoolctl").threadpool_limits(1, user_api="blas"):
        yield


_worker_data: Data


def _start_worker(data: Data) -> None:
    """Makes a process compute on one thread, and leave interrupts to its parent."""
    global _worker_data
    _worker_data = data
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_num_threads(1)
    extra("threadpoolctl").threadpool_limits(1, user_api="blas")


def _perform_in_worker(job: Job) -> Run:
    return perform(job, _worker_data)


Execute = Callable[[Iterable[Job]], Iterator[tuple[Job, Run]]]


@contextmanager
def executor(data: Data, workers: int) -> Iterator[Execute]:
    """Gives a function that performs jobs, in any order, in this process or in several."""
    if workers == 1:
        with one_thread():
            yield lambda jobs: ((job, perform(job, data)) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (data,))

    def execute(jobs: Iterable[Job]) -> Iterator[tuple[Job, Run]]:
        futures = {pool.submit(_perform_in_worker, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield execute
    finally:
        pool.shutdown(cancel_futures=True)


def seconds_per_step(kind: str, data: Data) -> tuple[float, float]:
    """The seconds per step without and with batch norm: the minimum of several turns, taken alternately."""
    images, labels = data.train[0][:BATCH], data.train[1][:BATCH]
    fastest = [np.inf, np.inf]
    with one_thread():
        optimizers = [Momentum(build(kind, norm), 0.01) for norm in (False, True)]
        for _ in range(12):
            for norm, optimizer in enumerate(optimizers):
                start = time.perf_counter()
                for _ in range(5):
                    optimizer.step(images, labels)
                fastest[norm] = min(fastest[norm], (time.perf_counter() - start) / 5)
    return fastest[0], fastest[1]
