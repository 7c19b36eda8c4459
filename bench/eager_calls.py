"""What does a small eager call of fastbn's layers cost beside torch's? On 512 values nearly all of it is overhead."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import fastbn.torch


class Case(NamedTuple):
    """A layer, and the input of its calls. The parameters are float64 for a float64 input, else of `parameters`."""

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    activation: str | None = None
    shape: tuple[int, ...] = (8, 64)
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    for_x: bool = True
    for_parameters: bool = True


CASES = (
    Case("(8, 64)"),
    Case("no running statistics", {"track_running_stats": False}),
    Case("affine=False", {"affine": False}),
    Case("ReLU", activation="relu"),
    Case("input without gradient", for_x=False),
    Case("parameters without gradient", for_parameters=False),
    Case("float64", dtype=torch.float64, parameters=torch.float64),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("bfloat16, parameters too", dtype=torch.bfloat16, parameters=torch.bfloat16),
    Case("(8, 64, 1, 1)", shape=(8, 64, 1, 1)),
    Case("(4, 8, 2, 2)", shape=(4, 8, 2, 2)),
    Case("(4, 8, 2, 2), channels_last", shape=(4, 8, 2, 2), memory_format=torch.channels_last),
)
Call = Callable[[], object]


def layers(case: Case, training: bool) -> tuple[nn.Module, nn.Module]:
    """Torch's layer and fastbn's."""
    kind = "BatchNorm1d" if len(case.shape) < 4 else "BatchNorm2d"
    theirs = getattr(nn, kind)(case.shape[1], **case.options)
    if case.activation == "relu":
        theirs = nn.Sequential(theirs, nn.ReLU())
    ours = getattr(fastbn.torch, kind)(case.shape[1], **case.options, activation=case.activation)
    for layer in (theirs, ours):
        layer.train(training).to(case.parameters).requires_grad_(case.for_parameters)
    return theirs, ours


def calls(case: Case, layer: nn.Module) -> dict[str, Call]:
    """The calls to time, by what they do; the gradients of backward() are added to those of the call before."""
    x, dy = (torch.randn(case.shape).to(case.dtype, memory_format=case.memory_format) for _ in range(2))
    x.requires_grad_(case.for_x)
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]

    def under(mode: Callable[[], Any]) -> Call:
        def call() -> None:
            with mode():
                layer(x)

        return call

    return {
        "forward": lambda: layer(x),
        "and grad": lambda: torch.autograd.grad(layer(x), wanted, dy),
        "and backward": lambda: layer(x).backward(dy),
        "no_grad": under(torch.no_grad),
        "inference": under(torch.inference_mode),
    }


def least(some: Sequence[Call], rounds: int) -> list[float]:
    """The microseconds of each call in its fastest round, in turns. Short rounds are less often disturbed."""
    found = [math.inf] * len(some)
    for _ in range(rounds):
        for i, call in enumerate(some):
            start = time.perf_counter()
            for _ in range(4):
                call()
            found[i] = min(found[i], (time.perf_counter() - start) / 4 * 1e6)
    return found


def report(rounds: int) -> None:
    """Prints, for each case and call, how many microseconds more than torch's layer fastbn's takes, and torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("\none eager call, one thread: microseconds more than torch's (and torch's)")
    for training, case in itertools.product((True, False), CASES):
        theirs, ours = (calls(case, layer) for layer in layers(case, training))
        if case == CASES[0]:
            print(f"{'training' if training else 'evaluation':<29}" + "".join(f"{what:>15}" for what in theirs))
        pairs = (least((theirs[what], ours[what]), rounds) for what in theirs)
        row = "".join(f"{b - a:+8.1f} ({a:4.1f})" for a, b in pairs)
        print(f"{case.name:<29}{row}", flush=True)
    torch.set_num_threads(before)
