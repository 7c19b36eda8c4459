from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

def forward(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    correction: int,
    eps: float,
    activation: int,
    y: Array,
    saved: Array,
    threads: int,
) -> None: ...
def infer(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    activation: int,
    y: Array,
    saved: Array | None,
    threads: int,
) -> None: ...
def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    saved: Array,
    frozen: bool,
    activation: int,
    dx: Array,
    dresidual: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    threads: int,
) -> None: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def select_isa(name: str) -> None: ...
def describe() -> dict[str, str]: ...
