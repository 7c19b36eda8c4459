"""Does `fastbn.onnx.load_norms` find every batch norm of an ONNX model, with its parameters and conventions?"""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest

if find_spec("onnx") is None:
    pytest.skip("needs onnx", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import onnx
    import onnx.helper
    import onnx.numpy_helper
    import onnx.parser
    import onnx.reference

import fastbn.onnx

Array = np.ndarray[Any, Any]
NAMES = ("scale", "B", "mean", "var")
SHAPE = (6, 3, 4)


def parameters(dtype: Any = "float32", channels: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(channels) for name in NAMES} | {"var": rng.uniform(0.5, 2, channels)}
    return {name: array.astype(dtype) for name, array in values.items()}


def model(
    opset: int = 15,
    kind: Any = "float32",
    of: Any = None,
    outputs: int = 1,
    arrays: dict[str, Array] | None = None,
    nodes: tuple[Any, ...] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node, "bn", whose X is of dtype `kind` and whose parameters are `arrays`, else of dtype `of`."""
    arrays = parameters(of or kind) if arrays is None else arrays
    data = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    names = ("y", "new_mean", "new_var", "saved_mean", "saved_var")[:outputs]
    node = onnx.helper.make_node("BatchNormalization", ["x", *NAMES], names, name="bn", **attributes)
    given = [onnx.helper.make_tensor_value_info("x", data, [None, *SHAPE[1:]])]
    results = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([*nodes, node], "batch_norm", given, results, stored)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def only(found: dict[str, fastbn.BatchNorm]) -> fastbn.BatchNorm:
    (layer,) = found.values()
    return layer


def run(proto: onnx.ModelProto, x: Array, operators: list[Any]) -> list[Any]:
    results: list[Any] = onnx.reference.ReferenceEvaluator(proto, new_ops=operators).run(None, {"x": x})
    return results


# What the evaluator gives --------------------------------------------------------------------------------------------

# In float64, the evaluator and fastbn round differently; halves are computed in halves there.
CLOSE = {"float32": 1e-6, "float64": 1e-14, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.parametrize("opset", [14, 15, 21])
@pytest.mark.parametrize("kind", CLOSE)
@pytest.mark.parametrize("trains", [False, True])
def test_gives_what_the_evaluator_gives(opset: int, kind: str, trains: bool) -> None:
    proto = model(opset, kind, outputs=3 if trains else 1, training_mode=int(trains), epsilon=0.25, momentum=0.75)
    layer = fastbn.onnx.load_norms(proto)["bn"]
    x = cases.call(SHAPE, kind).x
    wanted = run(proto, x, [])
    y = layer(x)
    assert layer.training is trains
    assert y.dtype == wanted[0].dtype == layer.dtype == np.dtype(kind)
    for got, other in zip((y, layer.running_mean, layer.running_var), wanted, strict=False):
        np.testing.assert_allclose(got.astype(float), other.astype(float), rtol=CLOSE[kind], atol=2 * CLOSE[kind])
    exact = oracle.forward(
        x,
        *parameters(kind).values() if not trains else list(parameters(kind).values())[:2],
        eps=0.25,
    )
    cases.assert_y(y, exact, parameters(kind)["scale"])


@pytest.mark.parametrize("opset", [6, 7, 8, 9, 13, 14, 15])
@pytest.mark.parametrize("trains", [False, True])
def test_every_opset(opset: int, trains: bool) -> None:
    """What tells that a node trains differs. fastbn's operator says what is right: onnx's own is not, before 14."""
    how = {"is_test": int(not trains)} if opset < 7 else {"training_mode": int(trains)} if opset >= 14 else {}
    proto = model(opset, outputs=(3 if opset >= 14 else 5) if trains else 1, **how)
    layer = only(fastbn.onnx.load_norms(proto))
    x = cases.call(SHAPE).x
    y, *running = run(proto, x, [fastbn.onnx.BatchNormalization])
    assert layer.training is trains
    cases.assert_same_bits(layer(x), y)
    if trains:
        np.testing.assert_allclose(layer.running_mean, running[0], rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, running[1], rtol=1e-6)


@pytest.mark.parametrize("kind", CLOSE)
def test_parameters_keep_their_dtypes(kind: str) -> None:
    """In opset 15 they may differ from X's, which decides the layer's."""
    layer = only(fastbn.onnx.load_norms(model(15, kind, of="float32")))
    assert layer.dtype == np.dtype(kind)
    arrays = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    for array, wanted in zip(arrays, parameters().values(), strict=True):
        cases.assert_same_bits(array, wanted)
    assert layer(cases.call(SHAPE, kind).x).dtype == np.dtype(kind)


def test_layers_have_arrays_of_their_own() -> None:
    proto = model(training_mode=1, outputs=3)
    before = proto.SerializeToString()
    one, other = (only(fastbn.onnx.load_norms(proto)) for _ in range(2))
    one(cases.call(SHAPE).x)
    assert not np.array_equal(one.running_mean, other.running_mean)
    assert proto.SerializeToString() == before


def test_defaults_are_those_of_the_operator() -> None:
    layer = only(fastbn.onnx.load_norms(model()))
    assert layer.eps == float(np.float32(1e-5))
    assert layer.momentum == pytest.approx(0.1)
    assert (layer.correction, layer.axis) == (0, 1)


# Where norms and their parameters are --------------------------------------------------------------------------------

TEXT = """<ir_version: 10, opset_import: ["": 15, "mine": 1]>
net (float[N, 2] x, bool first) => (float[N, 2] y)
<float[2] one = {1, 1}, float[2] two = {2, 2}, float[2] zero = {0, 0}> {
    c = Constant <value = float[2] {4, 4}> ()
    d = Constant <value_floats = [5.0, 5.0]> ()
    e = Identity (zero)
    f = Constant <value = double[2] {6, 6}> ()
    g = Cast <to = 1> (f)
    a = BatchNormalization (x, one, c, e, d)
    [outer] b = BatchNormalization <epsilon = 0.5> (a, g, zero, zero, one)
    h = If (first) <
        then_branch = yes () => (float[N, 2] t) {
            three = Constant <value = float[2] {3, 3}> ()
            [inner] t = BatchNormalization (b, two, zero, zero, three)
        },
        else_branch = no () => (float[N, 2] u) { u = Relu (b) }
    >
    y = mine.Norm <epsilon = 0.25> (h, two, zero, zero, one)
}
<domain: "mine", opset_import: ["": 15]>
Norm <epsilon> (x, scale, b, mean, var) => (y) {
    [called] y = BatchNormalization <epsilon: float = @epsilon> (x, scale, b, mean, var)
}"""


def test_finds_all() -> None:
    """By name or first output, in branches and functions; constants too, and what lies between."""
    found = fastbn.onnx.load_norms(onnx.parser.parse_model(TEXT))
    assert [name.partition("__")[0] for name in found] == ["a", "outer", "inner", "called"]
    a, outer, inner, called = found.values()
    assert [array.tolist() for array in (a.weight, a.bias, a.running_mean, a.running_var)] == [
        [1, 1], [4, 4], [0, 0], [5, 5],
    ]  # fmt: skip
    assert (outer.weight.tolist(), outer.weight.dtype, outer.eps) == ([6, 6], np.float32, 0.5)
    assert (inner.weight.tolist(), inner.running_var.tolist()) == ([2, 2], [3, 3])
    assert (called.weight.tolist(), called.eps) == ([2, 2], 0.25)


def test_layers_replace_the_nodes() -> None:
    proto = onnx.parser.parse_model(TEXT)
    a, outer, inner, called = fastbn.onnx.load_norms(proto).values()
    x = cases.call((7, 2)).x
    for first in (True, False):
        (wanted,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x, "first": np.array(first)})
        z = outer(a(x))
        got = called(inner(z) if first else np.maximum(z, 0))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_files(tmp_path: Path) -> None:
    """With the weights inside, or beside the model, wherever the process is."""
    proto, wanted = model(), parameters()
    onnx.save(proto, tmp_path / "one.onnx")
    onnx.save(proto, tmp_path / "two.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    for path in (tmp_path / "one.onnx", str(tmp_path / "two.onnx")):
        layer = fastbn.onnx.load_norms(path)["bn"]
        cases.assert_same_bits((layer.weight, layer.running_var), (wanted["scale"], wanted["var"]))
    apart = onnx.load(tmp_path / "two.onnx", load_external_data=False)
    with pytest.raises(ValueError, match=r"node 'bn' .*scale: got 'scale', whose values are in another file"):
        fastbn.onnx.load_norms(apart)
    assert only(fastbn.onnx.load_norms(onnx.load(tmp_path / "two.onnx"))).num_features == 3


def test_network_that_pytorch_exported() -> None:
    """Whose equal statistics are one initializer, which nodes called Identity pass on."""
    torch = pytest.importorskip("torch")
    norms = [torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)]
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norms[0], torch.nn.ReLU(), norms[1]).eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called a legacy
        options = {"dynamo": False, "do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
        torch.onnx.export(network, (torch.zeros(1, 3, 8, 8),), file, **options)
    proto = onnx.load_from_string(file.getvalue())
    assert "Identity" in {node.op_type for node in proto.graph.node}
    layers = fastbn.onnx.load_norms(proto)
    assert list(layers) == ["/1/BatchNormalization", "/3/BatchNormalization"]
    z = torch.randn(2, 4, 6, 6)
    for layer, norm in zip(layers.values(), norms, strict=True):
        np.testing.assert_allclose(layer(z.numpy()), norm(z).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_no_norms() -> None:
    text = '<ir_version: 10, opset_import: ["": 5]> net (float[N] x) => (float[N] y) { y = Relu (x) }'
    assert fastbn.onnx.load_norms(onnx.parser.parse_model(text)) == {}


# Bad input -----------------------------------------------------------------------------------------------------------


def test_missing_parameter() -> None:
    arrays = parameters()
    del arrays["mean"]
    with pytest.raises(ValueError, match=r"node 'bn' .*mean: got 'mean', an input of the model; allowed: an init"):
        fastbn.onnx.load_norms(model(arrays=arrays))


@pytest.mark.parametrize("operator", ["Relu", "RandomNormalLike"])
def test_computed_parameter(operator: str) -> None:
    arrays = parameters()
    arrays["given"] = arrays.pop("var")
    node = onnx.helper.make_node(operator, ["given"], ["var"])
    with pytest.raises(ValueError, match=rf"node 'bn' .*var: got 'var', the result of {operator}; allowed: an init"):
        fastbn.onnx.load_norms(model(arrays=arrays, nodes=(node,)))


@pytest.mark.parametrize(
    ("name", "array", "error", "words"),
    [
        ("B", np.zeros(4, np.float32), ValueError, r"B: got shape \(4,\); allowed: \(3,\)"),
        ("scale", np.zeros((3, 1), np.float32), ValueError, r"scale: got shape \(3, 1\); allowed: \(3,\)"),
        ("mean", np.zeros(3, np.int64), TypeError, "mean: got dtype int64"),
    ],
)
def test_parameter_that_does_not_fit(name: str, array: Array, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"node 'bn' .*{words}"):
        fastbn.onnx.load_norms(model(arrays=parameters() | {name: array}))


def test_not_spatial() -> None:
    with pytest.raises(ValueError, match=r"node 'bn' .*spatial: got 0; allowed: 1"):
        fastbn.onnx.load_norms(model(7, spatial=0))


def test_momentum_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"node 'bn' .*momentum: got 1\.5; allowed: 0 to 1"):
        fastbn.onnx.load_norms(model(momentum=1.5))


def test_old_opset() -> None:
    with pytest.raises(NotImplementedError, match="bn: BatchNormalization: got opset 5; allowed: 6 or later"):
        fastbn.onnx.load_norms(model(5))


def test_names_that_are_not_unique() -> None:
    twice = TEXT.replace("[inner]", "[outer]")
    with pytest.raises(ValueError, match="two BatchNormalization nodes named 'outer'"):
        fastbn.onnx.load_norms(onnx.parser.parse_model(twice))


def test_function_of_another_opset() -> None:
    other = TEXT.replace('<domain: "mine", opset_import: ["": 15]>', '<domain: "mine", opset_import: ["": 14]>')
    with pytest.raises(ValueError, match="functions that cannot be inlined"):
        fastbn.onnx.load_norms(onnx.parser.parse_model(other))


@pytest.mark.parametrize("wrong", [None, 3, b"model.onnx", parameters])
def test_wrong_kind(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model: got .*; allowed: an onnx.ModelProto, or the path of a file"):
        fastbn.onnx.load_norms(wrong)


@pytest.mark.parametrize("contents", [b"", b"not a model", bytes(range(256))])
def test_file_that_is_no_model(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(contents)
    with pytest.raises(ValueError, match=r"^model: got .*bad\.onnx, .*; allowed: an ONNX model"):
        fastbn.onnx.load_norms(tmp_path / "bad.onnx")


def test_weights_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"node 'bn' .*scale: .*weights\.bin"):
        fastbn.onnx.load_norms(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        fastbn.onnx.load_norms(tmp_path / "none.onnx")
