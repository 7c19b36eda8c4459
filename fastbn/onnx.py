"""How does an ONNX model run on fastbn? With this BatchNormalization, in onnx.reference.ReferenceEvaluator."""

import math

import numpy as np

from ._moments import blended
from .call import checks
from .call.dtypes import FLOAT64, kind_of, rounded
from .ops import forward, infer, moments

try:
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError('fastbn.onnx needs onnx: pip install "fastbn[onnx]"') from error

Array = np.ndarray

__all__ = ["BatchNormalization"]


def __dir__() -> list[str]:
    return sorted(__all__)


class BatchNormalization(OpRun):
    """ONNX's BatchNormalization of opsets 6 to 15, and of later opsets that keep the operator.

    See https://onnx.ai/onnx/operators/onnx__BatchNormalization.html. In training, y and the population variance are
    those of Ioffe & Szegedy 2015, algorithm 1. Accuracy and errors are those of fastbn.forward and fastbn.infer, except
    that one value per channel is enough in training too. A node trains if training_mode (opset 14) or is_test (opset 6)
    says so, and in opsets 7 and 9 if it has more outputs than Y. Statistics have the dtypes of mean and var.

    >>> import numpy as np
    >>> import onnx.parser, onnx.reference
    >>> import fastbn.onnx
    >>> model = onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 15]>
    ...     net (float[N, 2] x, float[2] scale, float[2] b, float[2] mean, float[2] var) => (float[N, 2] y) {
    ...         y = BatchNormalization <epsilon = 0.0> (x, scale, b, mean, var)
    ...     }''')
    >>> evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=[fastbn.onnx.BatchNormalization])
    >>> one = np.ones(2, np.float32)
    >>> x = np.array([[1, 2], [3, 4]], np.float32)
    >>> evaluator.run(None, {"x": x, "scale": one, "b": 0 * one, "mean": 2 * one, "var": one})[0].tolist()
    [[-1.0, 0.0], [1.0, 2.0]]
    """

    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        b: Array,
        mean: Array,
        var: Array,
        *,
        epsilon: float,
        momentum: float,
        training_mode: int = 0,
        is_test: int = 0,
        spatial: int = 1,
    ) -> tuple[Array, ...]:
        opset = self.run_params["opsets"][self.op_domain]
        checks.opset("BatchNormalization", opset, 6)
        if opset < 14:
            training_mode = not is_test if opset < 7 else any(self.output[1:])
        data, likes = checks.data("X", x), (mean, var, mean, var)
        if not spatial:  # each element of a sample is then a channel
            data = data.reshape(len(x), math.prod(x.shape[1:]))
            scale, b, mean, var = (array.reshape(-1) for array in (scale, b, mean, var))
        elif x.ndim == 1:
            data = data[:, np.newaxis]
        if not training_mode:
            statistics = kind_of(data.dtype).statistics
            y = infer(data, scale, b, mean.astype(statistics), var.astype(statistics), eps=float(epsilon))
            return (y.reshape(x.shape),)
        y, *found = _trained(data, scale, b, mean, var, float(epsilon), float(momentum))
        with np.errstate(over="ignore"):
            outputs = [rounded(array, like.dtype).reshape(like.shape) for array, like in zip(found, likes, strict=True)]
        return y.reshape(x.shape), *outputs[: 2 if opset >= 14 else 4]


def _trained(
    x: Array, scale: Array, b: Array, mean: Array, var: Array, epsilon: float, momentum: float
) -> tuple[Array, ...]:
    """Returns y, the running statistics and those of the batch, which may have only one value per channel."""
    found = moments(x)
    batch = found.mean, found.var()
    if found.count > 1:
        y = forward(x, scale, b, eps=epsilon, moments=found).y
    else:
        y = infer(x, scale, b, *batch, eps=epsilon)
    # In ONNX the momentum is the weight of the old value.
    pairs = zip((mean, var), batch, strict=True)
    running = (blended(new.astype(FLOAT64), old.astype(FLOAT64), momentum) for old, new in pairs)
    return y, *running, *batch
