"""How do ONNX models run on fastbn? By an operator for onnx's reference evaluator, or with their norms as layers."""

import math
import os
from collections import ChainMap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ._moments import blended
from .call import checks
from .call.dtypes import FLOAT64, KINDS, kind_of, rounded
from .layer import BatchNorm
from .ops import forward, infer, moments

try:
    import onnx
    import onnx.external_data_helper
    import onnx.inliner
    import onnx.numpy_helper
    import onnx.shape_inference
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError('fastbn.onnx needs onnx: pip install "fastbn[onnx]"') from error

Array = np.ndarray

__all__ = ["BatchNormalization", "load_norms"]


OLDEST = 6
"""The oldest opset that is supported."""


def __dir__() -> list[str]:
    return sorted(__all__)


def _trains(opset: int, outputs: Sequence[str], training_mode: int, is_test: int) -> bool:
    """Whether a node normalizes with the statistics of the batch."""
    if opset >= 14:
        return bool(training_mode)
    return not is_test if opset < 7 else any(outputs[1:])


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
    ...     net (float[N, 2] x, float[2] scale, float[2] b, float[2] mean, float[2] var)
    ...     => (float[N, 2] y) {
    ...         y = BatchNormalization <epsilon = 0.0> (x, scale, b, mean, var)
    ...     }''')
    >>> ops = [fastbn.onnx.BatchNormalization]
    >>> evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=ops)
    >>> one = np.ones(2, np.float32)
    >>> x = np.array([[1, 2], [3, 4]], np.float32)
    >>> inputs = {"x": x, "scale": one, "b": 0 * one, "mean": 2 * one, "var": one}
    >>> evaluator.run(None, inputs)[0].tolist()
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
        checks.opset("BatchNormalization", opset, OLDEST)
        training_mode = _trains(opset, self.output, training_mode, is_test)
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


# Layers of a model ---------------------------------------------------------------------------------------------------

PARAMETERS = {"scale": "weight", "B": "bias", "mean": "running_mean", "var": "running_var"}
"""The operator's inputs after X, in order, and the attributes of a layer that they become."""

DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}

EVALUATED = frozenset(("Constant", "Cast", "ConstantOfShape", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
"""The operators whose results are known if their inputs are: what exporters put between an initializer and a norm."""

Scope = ChainMap[str, Any]
"""What each name in a graph stands for: an initializer, the node that computes it, or None for an input."""


def load_norms(model: onnx.ModelProto | str | os.PathLike[str]) -> dict[str, BatchNorm]:
    """The batch norms of an ONNX model, as layers with its parameters and statistics.

    Each BatchNormalization of opset 6 or later becomes a `fastbn.BatchNorm`, also in the branches and loops of the
    model and in its functions, which are inlined first. A layer gives what the node gives: it starts in training mode
    if the node trains, which takes 2 values per channel, and otherwise as after `eval()`. The arrays are copies, in the
    dtypes that the model has them in, and epsilon and momentum are the model's float32 numbers. In training the running
    variance is biased, as in ONNX.

    Parameters
    ----------
    model : onnx.ModelProto, or the path of a file
        Weights in files beside the model are read if they belong to a norm.

    Returns
    -------
    dict
        The layers by the names of their nodes, in the order of the model. A node without a name goes by its first
        output. A layer's dtype is that of X; where the model does not tell that, it is that of scale.

    Raises
    ------
    TypeError
        If the model is neither.
    ValueError
        If the file is not an ONNX model, if a parameter is neither an initializer nor computed from constants alone, if
        it does not fit the others, if two nodes have the same name, and for spatial=0. The message names the node.
    NotImplementedError
        For a BatchNormalization of an opset before 6.

    >>> import numpy as np
    >>> import onnx.parser
    >>> import fastbn.onnx
    >>> model = onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 15]>
    ...     net (float[N, 2] x) => (float[N, 2] y)
    ...     <float[2] one = {1, 1}, float[2] zero = {0, 0}, float[2] mean = {2, 2}> {
    ...         [norm] y = BatchNormalization <epsilon = 0.0> (x, one, zero, mean, one)
    ...     }''')
    >>> norms = fastbn.onnx.load_norms(model)
    >>> norms["norm"](np.array([[1, 2], [3, 4]], np.float32)).tolist()
    [[-1.0, 0.0], [1.0, 2.0]]
    >>> plan = norms["norm"].plan()
    """
    proto, folder = _read(model)
    opset = max((entry.version for entry in proto.opset_import if entry.domain in _ONNX), default=1)
    if _has_norms_in_functions(proto):
        proto = onnx.inliner.inline_local_functions(proto)
        if _has_norms_in_functions(proto):
            raise ValueError(
                "model: got functions that cannot be inlined; allowed: functions of the model's own opsets"
            )
    norms = [(node, scope) for node, scope in _nodes(proto.graph, ChainMap()) if _is_norm(node)]
    types = _types(proto) if opset >= 15 and norms else {}
    layers: dict[str, BatchNorm] = {}
    for node, scope in norms:
        name = node.name or node.output[0]
        checks.opset(f"{name}: BatchNormalization", opset, OLDEST)
        if name in layers:
            raise ValueError(f"model: got two BatchNormalization nodes named {name!r}; allowed: names that differ")
        try:
            layers[name] = _layer(node, opset, types, _Values(scope, opset, folder))
        except (TypeError, ValueError) as error:
            raise type(error)(f"node {name!r} (BatchNormalization): {error}") from error
    return layers


_ONNX = ("", "ai.onnx")
"""The names of ONNX's own domain."""


def _read(model: object) -> tuple[onnx.ModelProto, str | None]:
    """The model, and the folder of the files with its weights; None if it did not come from a file."""
    if isinstance(model, onnx.ModelProto):
        return model, None
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model: got {checks.kind(model)}; allowed: an onnx.ModelProto, or the path of a file")
    path = os.fspath(model)
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's, or that of another format
        raise ValueError(f"model: got {path}, which cannot be read ({error}); allowed: an ONNX model") from error
    if not proto.HasField("graph"):
        raise ValueError(f"model: got {path}, in which there is no graph; allowed: an ONNX model")
    return proto, os.path.dirname(os.path.abspath(path))


def _is_norm(node: onnx.NodeProto) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in _ONNX


def _has_norms_in_functions(model: onnx.ModelProto) -> bool:
    return any(_is_norm(node) for function in model.functions for node, _ in _nodes(function, ChainMap()))


def _nodes(graph: Any, outer: Scope) -> Iterator[tuple[onnx.NodeProto, Scope]]:
    """The nodes of a graph or function and of the graphs inside it, each with the names that it can refer to."""
    scope = outer.new_child()
    if isinstance(graph, onnx.GraphProto):
        scope.update({value.name: None for value in graph.input})
        scope.update({tensor.name: tensor for tensor in graph.initializer})
    scope.update({name: node for node in graph.node for name in node.output})
    for node in graph.node:
        yield node, scope
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner, scope)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element types of all values, by name."""
    found: dict[str, int] = {}
    graphs = [onnx.shape_inference.infer_shapes(model).graph]
    for graph in graphs:
        for value in (*graph.input, *graph.value_info, *graph.output):
            found[value.name] = value.type.tensor_type.elem_type
        graphs += [g for node in graph.node for a in node.attribute for g in (a.g, *a.graphs)]
    return found


class _Values:
    """The values that names in a graph have before it runs."""

    def __init__(self, scope: Scope, opset: int, folder: str | None) -> None:
        self.scope, self.opset, self.folder = scope, opset, folder

    def of(self, name: str) -> Array:
        """The value of an initializer, or of what is computed from initializers and constants."""
        source = self.scope.get(name)
        if isinstance(source, onnx.TensorProto):
            return self._tensor(source)
        if source is None or source.op_type not in EVALUATED or source.domain not in _ONNX:
            by = "an input of the model" if source is None else f"the result of {source.op_type}"
            raise ValueError(f"got {name!r}, {by}; allowed: an initializer or the output of a Constant")
        for attribute in source.attribute:
            if attribute.name == "value" and source.op_type == "Constant":
                return self._tensor(attribute.t)
        known = {given: self.of(given) for given in source.input if given}
        evaluator: Any = ReferenceEvaluator(source, opsets={"": self.opset})
        result: Array = evaluator.run(None, known)[0]
        return result

    def _tensor(self, tensor: onnx.TensorProto) -> Array:
        if self.folder is None and onnx.external_data_helper.uses_external_data(tensor):
            raise ValueError(
                f"got {tensor.name!r}, whose values are in another file; allowed: the path of the model instead of "
                "the model, or a model that onnx.load has read with its data"
            )
        return onnx.numpy_helper.to_array(tensor, self.folder or "")


def _layer(node: onnx.NodeProto, opset: int, types: dict[str, int], values: _Values) -> BatchNorm:
    """The layer of one node."""
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if not given.get("spatial", 1):
        raise ValueError("spatial: got 0; allowed: 1, which is statistics per channel")
    if len(node.input) != 5:
        raise ValueError(f"got {len(node.input)} inputs; allowed: 5")
    arrays: dict[str, Array] = {}
    for name, source in zip(PARAMETERS, node.input[1:], strict=True):
        try:
            arrays[name] = values.of(source)
        except Exception as error:  # of onnx, too, such as that of a file that is missing
            raise ValueError(f"{name}: {error}") from error
        checks.parameter(name, arrays[name], arrays["scale"].size, "channel of scale")
    scale = arrays["scale"]
    found = [types[name] for name in (node.input[0], *node.output[:1]) if types.get(name)]
    bn = BatchNorm.onnx(
        scale.size,
        momentum=given.get("momentum", float(np.float32(0.9))),
        epsilon=given.get("epsilon", float(np.float32(1e-5))),
        dtype=_dtype(found[0]) if found else scale.dtype,
    )
    for name, attribute in PARAMETERS.items():
        setattr(bn, attribute, arrays[name].copy())
    return bn.train(_trains(opset, node.output, given.get("training_mode", 0), given.get("is_test", 0)))


def _dtype(element: int) -> str:
    if element not in DTYPES:
        raise TypeError(f"X: got {onnx.TensorProto.DataType.Name(element)}; allowed: {', '.join(KINDS)}")
    return DTYPES[element]
