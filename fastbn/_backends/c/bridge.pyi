from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastbn.call.record import BackwardCall, Call

Array = np.ndarray[Any, Any]

DTYPES: frozenset[str]

def forward(call: Call) -> None: ...
def infer(call: Call) -> None: ...
def apply(call: Call) -> None: ...
def moments(call: Call) -> None: ...
def backward_sums(call: BackwardCall) -> None: ...
def backward(call: BackwardCall) -> None: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def select_isa(name: str) -> None: ...
def openmp() -> int: ...
def most_threads() -> int: ...
def describe() -> dict[str, str]: ...
def flat() -> dict[str, tuple[int, str]]: ...
def numbers() -> dict[str, int]: ...
def use_one_thread() -> None: ...
def express_infer(
    x: object,
    gamma: object,
    beta: object,
    mean: object,
    var: object,
    eps: object,
    axis: object,
    activation: object,
    residual: object,
    out: object,
    threads: Callable[[], int],
) -> Array | None: ...
def express_forward(
    x: object,
    gamma: object,
    beta: object,
    mean: object,
    var: object,
    momentum: object,
    correction: object,
    eps: object,
    axis: object,
    activation: object,
    residual: object,
    out: object,
    training: bool,
    threads: Callable[[], int],
) -> tuple[Array, Array] | None: ...
def express_backward(
    dy: object,
    x: object,
    residual: object,
    saved: object,
    axis: object,
    frozen: object,
    activation: object,
    has_gamma: object,
    has_beta: object,
    out: object,
    threads: Callable[[], int],
) -> tuple[Array, Array | None, Array | None, Array | None] | None: ...
def forward_at(
    number: int,
    shape: tuple[int, ...],
    axis: int,
    addresses: tuple[int, ...],
    y: int,
    momentum: float,
    eps: float,
    activation: object,
    training: bool,
    keeps: bool,
    threads: Callable[[], int],
) -> Array | bool | None: ...
def backward_at(
    number: int,
    shape: tuple[int, ...],
    axis: int,
    addresses: tuple[int, ...],
    dx: int,
    saved: Array,
    frozen: bool,
    activation: object,
    dgamma: int,
    dbeta: int,
    dresidual: int,
    threads: Callable[[], int],
) -> bool | None: ...
def add_one_at(address: int) -> None: ...

class Tensors:
    def __init__(
        self,
        classes: frozenset[type],
        exchange: object,
        empty_like: Callable[[Any], Any],
        threads: Callable[[], int],
    ) -> None: ...
    def place(
        self,
        x: object,
        residual: object,
        gamma: object,
        beta: object,
        mean: object,
        var: object,
        channels: object,
        batch: bool,
    ) -> tuple[tuple[int, ...], tuple[int, ...], int] | None: ...
    def normalize(
        self,
        where: tuple[object, ...],
        x: object,
        momentum: float,
        eps: float,
        activation: object,
        training: bool,
        keeps: bool,
    ) -> tuple[Any, Any] | None: ...
    def differentiate(
        self,
        dy: object,
        x: object,
        residual: object,
        gamma: object,
        beta: object,
        saved: Array,
        training: bool,
        activation: object,
        wanted: Sequence[bool],
    ) -> tuple[Any, Any, Any, Any, None] | None: ...

class Plan:
    def __init__(
        self,
        gamma: Array | None,
        beta: Array | None,
        mean: Array,
        var: Array,
        eps: float,
        axis: int,
        activation: int,
        slope: float,
        threads: Callable[[], int],
    ) -> None: ...
    def run(self, x: object, out: object, residual: object) -> Array | None: ...
