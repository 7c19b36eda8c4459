"""PyTorch's functions, an activation in a second call: as users call them, and with the memory of results reused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from ..problem import EPS, MOMENTUM, Array, Contestant, Problem
from . import glibc


class Rival:
    """torch.nn.functional.batch_norm, and the backward function that autograd would call, without autograd's graph.

    An activation is applied in place. The backward pass of both is autograd's, with a graph that is kept.
    """

    def __init__(self) -> None:
        self._torch: Any = importlib.import_module("torch")
        self.version = str(self._torch.__version__)
        self.notes = () if glibc.available() else ('"torch reused" is left out, since it needs glibc\'s allocator',)

    def set_threads(self, threads: int) -> None:
        self._torch.set_num_threads(threads)

    def tensor(self, array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            return self._torch.from_numpy(array.view("int16")).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)

    def _numpy(self, tensor: Any) -> Array:
        array: Array = (tensor.float() if tensor.element_size() == 2 else tensor).detach().numpy()
        return array

    def _call(self, problem: Problem, pass_: str) -> Callable[[], Any]:
        x, dy = (self.tensor(problem.channels_first(a)) for a in (problem.x, problem.dy))
        gamma, beta = self.tensor(problem.gamma), self.tensor(problem.beta)
        mean, var = map(self.tensor, problem.running())
        function = self._torch.nn.functional.batch_norm
        activation = self.activation(problem.activation)
        if pass_ != "backward":
            call = partial(function, x, mean, var, gamma, beta, pass_ == "forward", MOMENTUM, EPS)
            return (lambda: activation(call(), inplace=True)) if activation else call
        if activation:
            inputs = [tensor.requires_grad_() for tensor in (x, gamma, beta)]
            y = activation(function(x, mean, var, gamma, beta, True, MOMENTUM, EPS))
            return partial(self._torch.autograd.grad, y, inputs, dy, retain_graph=True)
        _, *saved = self._torch.native_batch_norm(x, gamma, beta, None, None, True, MOMENTUM, EPS)
        backward = self._torch.ops.aten.native_batch_norm_backward.default
        return partial(backward, dy, x, gamma, mean, var, *saved, True, EPS, [True, True, True])

    def activation(self, name: str) -> Callable[..., Any] | None:
        if name == "none":
            return None
        if name == "sigmoid":  # the only function without inplace=
            return lambda z, inplace=False: z.sigmoid_() if inplace else z.sigmoid()
        function: Callable[..., Any] = getattr(self._torch.nn.functional, name)
        return function

    def results(self, value: Any) -> tuple[Array, ...]:
        return tuple(map(self._numpy, value if isinstance(value, tuple) else (value,)))

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        call = self._call(problem, pass_)
        contestants = [Contestant(name="torch", call=call, results=self.results)]
        if glibc.available():
            within = partial(glibc.freed_memory_kept, call, problem.x.nbytes)
            contestants.append(Contestant(name="torch reused", call=call, results=self.results, within=within))
        return contestants
