"""ONNX Runtime: inference with a model of one node, with input and output bound."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from ..problem import EPS, Array, Contestant, Problem

OPSET, IR_VERSION = 15, 8


class Rival:
    """onnxruntime.InferenceSession.run_with_iobinding on the CPU provider."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._ort: Any = importlib.import_module("onnxruntime")
        self._onnx: Any = importlib.import_module("onnx")
        self.version = str(self._ort.__version__)
        self._threads = 1

    def set_threads(self, threads: int) -> None:
        self._threads = threads

    def _model(self, problem: Problem) -> bytes:
        helper, element = self._onnx.helper, self._onnx.helper.np_dtype_to_tensor_dtype(problem.x.dtype)
        constants = {"gamma": problem.gamma, "beta": problem.beta, "mean": problem.mean, "var": problem.var}
        graph = helper.make_graph(
            [helper.make_node("BatchNormalization", ["x", *constants], ["y"], epsilon=EPS)],
            "batch_normalization",
            [helper.make_tensor_value_info("x", element, problem.shape)],
            [helper.make_tensor_value_info("y", element, problem.shape)],
            [self._onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opset = helper.make_opsetid("", OPSET)
        serialized: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION).SerializeToString()
        return serialized

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        if pass_ != "infer" or problem.layout == "nhwc" or problem.dtype not in ("float32", "float64"):
            return []
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = self._ort.InferenceSession(self._model(problem), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        value = self._ort.OrtValue.ortvalue_from_numpy
        kept = {"x": value(problem.x), "y": value(problem.out)}
        binding.bind_ortvalue_input("x", kept["x"])
        binding.bind_ortvalue_output("y", kept["y"])

        def results(_: Any) -> tuple[Array, ...]:
            return (kept["y"].numpy(),)

        return [Contestant(name="ONNX Runtime", call=partial(session.run_with_iobinding, binding), results=results)]
