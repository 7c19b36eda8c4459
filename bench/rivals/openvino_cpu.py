"""OpenVINO: inference on its CPU device, with input and output bound."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from ..problem import EPS, Contestant, Problem


class Rival:
    """A compiled BatchNormInference and its request."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._openvino: Any = importlib.import_module("openvino")
        self._operations: Any = importlib.import_module("openvino.opset13")
        self.version = str(self._openvino.__version__).split("-")[0]
        self._core = self._openvino.Core()
        self._threads = 1

    def set_threads(self, threads: int) -> None:
        self._threads = threads

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        if pass_ != "infer" or problem.layout == "nhwc" or problem.dtype != "float32":
            return []
        x = self._operations.parameter(list(problem.shape), problem.x.dtype)
        constants = (problem.gamma, problem.beta, problem.mean, problem.var)
        model = self._openvino.Model([self._operations.batch_norm_inference(x, *constants, EPS)], [x])
        hints = {"INFERENCE_NUM_THREADS": self._threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        request = self._core.compile_model(model, "CPU", hints).create_infer_request()
        request.set_input_tensor(self._openvino.Tensor(problem.x, shared_memory=True))
        request.set_output_tensor(self._openvino.Tensor(problem.out, shared_memory=True))
        call = partial(request.infer, share_outputs=True)
        return [Contestant(name="OpenVINO", call=call, results=lambda _: (problem.out,))]
