"""torch.compile: batch norm and its activation in one compiled function. Without an activation it is not timed."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from ..problem import EPS, MOMENTUM, Contestant, Problem
from . import pytorch

COMPILERS = ("g++", "clang++")


class Rival:
    """torch.nn.functional.batch_norm and an activation, compiled by inductor for each race."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._eager, self._torch = pytorch.Rival(), importlib.import_module("torch")
        named = shlex.split(os.environ.get("CXX", ""))[:1]
        if not any(map(shutil.which, named or COMPILERS)):
            raise ImportError(f"it needs a C++ compiler, such as {' or '.join(COMPILERS)}; CXX names another")
        importlib.import_module("torch._functorch.config").donated_buffer = False  # as the graph is kept
        self.version = f"{self._torch.__version__}, inductor"

    def set_threads(self, threads: int) -> None:
        self._torch.set_num_threads(threads)
        self._torch._dynamo.reset()  # compiled code has its number of threads in it

    def _call(self, problem: Problem, pass_: str) -> Callable[[], Any]:
        tensor, torch = self._eager.tensor, self._torch
        x, dy = (tensor(problem.channels_first(a)) for a in (problem.x, problem.dy))
        gamma, beta, mean, var = map(tensor, (problem.gamma, problem.beta, *problem.running()))
        activation, batch_norm = self._eager.activation(problem.activation), torch.nn.functional.batch_norm
        assert activation is not None

        @torch.compile(dynamic=False)  # type: ignore[untyped-decorator, unused-ignore]
        def compiled(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
            return activation(batch_norm(x, mean, var, gamma, beta, pass_ != "infer", MOMENTUM, EPS))

        if pass_ != "backward":
            return partial(compiled, x, mean, var, gamma, beta)
        inputs = [one.requires_grad_() for one in (x, gamma, beta)]
        y = compiled(x, mean, var, gamma, beta)
        return partial(torch.autograd.grad, y, inputs, dy, retain_graph=True)

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        self._torch._dynamo.reset()
        return [Contestant(name="torch.compile", call=self._call(problem, pass_), results=self._eager.results)]
