"""Does fastbn.onnx compute what ONNX says, in its reference evaluator?"""

from __future__ import annotations

import re
import warnings
from importlib import import_module
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
    import onnx.backend.test.case.node
    import onnx.backend.test.loader
    import onnx.parser
    import onnx.reference

import fastbn.onnx

Array = np.ndarray[Any, Any]
EXAMPLE = cases.CHECKOUT / "examples" / "onnx_reference.py"
INPUTS = ("x", "scale", "b", "mean", "var")


def evaluator(opset: int, outputs: int = 1, **attributes: Any) -> Any:
    """A model of nothing but the operator, on fastbn."""
    names = ("y", "new_mean", "new_var", "saved_mean", "saved_var")[:outputs]
    node = onnx.helper.make_node("BatchNormalization", INPUTS, names, **attributes)
    values = (
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in some]
        for some in (INPUTS, names)
    )
    graph = onnx.helper.make_graph([node], "batch_norm", *values)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return onnx.reference.ReferenceEvaluator(model, new_ops=[fastbn.onnx.BatchNormalization])


def feeds(c: cases.Call) -> dict[str, Any]:
    return dict(zip(INPUTS, (c.x, c.gamma, c.beta, c.running_mean, c.running_var), strict=True))


# ONNX's own test data ------------------------------------------------------------------------------------------------


def has_the_operator(model: Any) -> bool:
    return any(node.op_type == "BatchNormalization" for node in model.graph.node)


def with_the_operator(folder: str | Path, pattern: str) -> list[Path]:
    """The files that name it at all: the others take seconds to run or to read."""
    return [path for path in sorted(Path(folder).glob(pattern)) if b"BatchNormalization" in path.read_bytes()]


def node_cases() -> dict[str, Any]:
    """Those that ONNX makes for each operator, with the model and the data; in modules that it imports all."""
    package = onnx.backend.test.case.node
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in with_the_operator(package.__path__[0], "*.py"):
            import_module(f"{package.__name__}.{path.stem}")
    return {case.name: case for case in package._NodeTestCases if has_the_operator(case.model)}


def stored_cases() -> dict[str, Path]:
    """Those that lie in folders of the package: models that PyTorch exported, and such."""
    found = with_the_operator(onnx.backend.test.loader.DATA_DIR, "*/*/model.onnx")
    return {path.parent.name: path for path in found if has_the_operator(onnx.load(path))}


def networks() -> dict[str, Path]:
    """Those that are whole networks, without their weights."""
    found = with_the_operator(Path(onnx.backend.test.loader.DATA_DIR) / "light", "*.onnx")
    return {path.stem: path for path in found if has_the_operator(onnx.load(path))}


NODE_CASES, STORED_CASES, NETWORKS = node_cases(), stored_cases(), networks()


def test_there_are_cases() -> None:
    """The tests below would pass if nothing were found."""
    assert {"test_batchnorm_example", "test_batchnorm_epsilon_training_mode"} <= set(NODE_CASES)
    assert "test_BatchNorm2d_eval" in STORED_CASES
    assert "light_resnet50" in NETWORKS


class Counted(fastbn.onnx.BatchNormalization):
    """Fastbn's, which counts its calls."""

    calls = 0

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        Counted.calls += 1
        return super()._run(*inputs, **attributes)


Counted.__name__ = "BatchNormalization"


def run(model: Any, inputs: list[Array], wanted: list[Array], rtol: float, atol: float) -> None:
    before = Counted.calls
    weights = {value.name for value in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    ready = onnx.reference.ReferenceEvaluator(model, new_ops=[Counted])
    got = ready.run(None, dict(zip(names, inputs, strict=True)))
    assert Counted.calls > before
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol, atol)


@pytest.mark.parametrize("name", NODE_CASES)
def test_node_case(kernel: cases.Kernel, name: str) -> None:
    case = NODE_CASES[name]
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        run(case.model, inputs, outputs, case.rtol, case.atol)


@pytest.mark.parametrize("name", STORED_CASES)
def test_stored_case(name: str) -> None:
    path = STORED_CASES[name]
    folders = sorted(path.parent.glob("test_data_set_*"))
    assert folders
    for folder in folders:
        inputs, outputs = (
            [
                onnx.numpy_helper.to_array(onnx.load_tensor(folder / f"{kind}_{number}.pb"))
                for number in range(len(list(folder.glob(f"{kind}_*.pb"))))
            ]
            for kind in ("input", "output")
        )
        run(onnx.load(path), inputs, outputs, 1e-3, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    """On the input that ONNX's own runner makes for them."""
    model = onnx.load(NETWORKS[name])
    weights = {value.name for value in model.graph.initializer}
    (given,) = (value for value in model.graph.input if value.name not in weights)
    shape = [dimension.dim_value for dimension in given.type.tensor_type.shape.dim]
    x = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)
    wanted = onnx.numpy_helper.to_array(onnx.load_tensor(NETWORKS[name].with_name(f"{name}_output_0.pb")))
    run(model, [x], [wanted], 1e-3, 1e-7)


# Every opset ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [6, 7, 8, 9, 13, 14, 15, 18])
@pytest.mark.parametrize("shape", [(8, 5), (6, 5, 3), (2, 5, 4, 3)], ids=str)
def test_inference(kernel: cases.Kernel, opset: int, shape: tuple[int, ...]) -> None:
    c = cases.call(shape)
    (y,) = evaluator(opset, epsilon=0.25, **({"is_test": 1} if opset < 7 else {})).run(None, feeds(c))
    cases.assert_same_bits(y, fastbn.infer(c.x, *list(feeds(c).values())[1:], eps=0.25))


@pytest.mark.parametrize("opset", [6, 7, 9, 14, 15])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_training(kernel: cases.Kernel, opset: int, kind: str) -> None:
    """With the population variance; and up to opset 13 the statistics of the batch are outputs, too."""
    c = cases.call((4, 5, 3), kind, offset=100)
    options = {"training_mode": 1} if opset >= 14 else {}
    y, *statistics = evaluator(opset, 3 if opset >= 14 else 5, momentum=0.75, **options).run(None, feeds(c))
    exact = oracle.forward(c.x, c.gamma, c.beta, eps=float(np.float32(1e-5)))
    cases.assert_y(y, exact, c.gamma)
    cases.assert_running("mean", statistics[0], c.running_mean, exact.mean, 0.25, size=abs(c.x).max())
    cases.assert_running("var", statistics[1], c.running_var, exact.var, 0.25)
    assert len(statistics) == (2 if opset >= 14 else 4)
    for got, wanted in zip(statistics[2:], (exact.mean, exact.var), strict=False):
        assert got.dtype == c.x.dtype
        np.testing.assert_allclose(got, wanted.astype(kind), rtol=1e-6)


def test_defaults(kernel: cases.Kernel) -> None:
    """Those of the operator's schema."""
    c = cases.call((4, 5, 3))
    y, mean, _ = evaluator(15, 3, training_mode=1).run(None, feeds(c))
    given = evaluator(15, 3, training_mode=1, epsilon=1e-5, momentum=0.9).run(None, feeds(c))
    cases.assert_same_bits((y, mean), tuple(given[:2]))
    assert evaluator(15, 1, training_mode=1).run(None, feeds(c))[0].tobytes() == y.tobytes()


@pytest.mark.parametrize("opset", [6, 7, 8])
def test_not_spatial(kernel: cases.Kernel, opset: int) -> None:
    """A statistic for every place of a sample."""
    c = cases.call((6, 5, 3, 2))
    rng = np.random.default_rng(0)
    places = {name: rng.uniform(0.5, 2, (5, 3, 2)).astype(np.float32) for name in INPUTS[1:]}
    inputs = {"x": c.x, **places}
    (y,) = evaluator(opset, spatial=0, **({"is_test": 1} if opset < 7 else {})).run(None, inputs)
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    exact = (wide["x"] - wide["mean"]) / np.sqrt(wide["var"] + 1e-5) * wide["scale"] + wide["b"]
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)
    y, mean, *_ = evaluator(opset, 5, spatial=0, momentum=0.5).run(None, inputs)
    np.testing.assert_allclose(mean, (wide["mean"] + wide["x"].mean(axis=0)) / 2, rtol=1e-5, atol=1e-6)
    exact = (wide["x"] - wide["x"].mean(axis=0)) / np.sqrt(wide["x"].var(axis=0) + 1e-5) * wide["scale"] + wide["b"]
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", cases.HALVES)
@pytest.mark.parametrize("statistics", ["float32", "float64", "the same"])
def test_dtypes_of_their_own(kernel: cases.Kernel, kind: str, statistics: str) -> None:
    """Of x, of scale and b, and of the statistics, which come out as they came in."""
    c = cases.call((6, 5, 3), kind)
    mixed = kind if statistics == "the same" else statistics
    inputs = feeds(c) | {name: feeds(c)[name].astype(mixed) for name in ("mean", "var")}
    y, mean, var = evaluator(15, 3, training_mode=1).run(None, inputs)
    assert (y.dtype, mean.dtype, var.dtype) == (np.dtype(kind), np.dtype(mixed), np.dtype(mixed))
    cases.assert_y(y, oracle.forward(c.x, c.gamma, c.beta, eps=float(np.float32(1e-5))), c.gamma)
    (y,) = evaluator(15).run(None, inputs)
    given = (inputs[name].astype(np.float32) for name in ("mean", "var"))
    exact = oracle.forward(c.x, c.gamma, c.beta, *given, eps=float(np.float32(1e-5)))
    cases.assert_y(y, exact, c.gamma)


def test_one_axis(kernel: cases.Kernel) -> None:
    """Is one channel."""
    c = cases.call((9, 1))
    (y,) = evaluator(15).run(None, feeds(c) | {"x": c.x[:, 0]})
    cases.assert_same_bits(y, evaluator(15).run(None, feeds(c))[0][:, 0])


def test_one_value_per_channel(kernel: cases.Kernel) -> None:
    """Is the mean of its batch: y is b."""
    c = cases.call((1, 5), offset=100)
    y, mean, var = evaluator(15, 3, training_mode=1, momentum=0.5).run(None, feeds(c))
    assert np.array_equal(y[0], c.beta)
    np.testing.assert_allclose(mean, (c.running_mean + c.x[0]) / 2, rtol=1e-6)
    np.testing.assert_allclose(var, c.running_var / 2, rtol=1e-6)


def test_inputs_stay(kernel: cases.Kernel) -> None:
    c = cases.call((6, 5, 3))
    before = [array.tobytes() for array in feeds(c).values()]
    evaluator(15, 3, training_mode=1).run(None, feeds(c))
    assert before == [array.tobytes() for array in feeds(c).values()]


def test_in_a_function_and_a_model() -> None:
    """Attributes that a function passes on, and a result that another operator takes."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 15, "mine": 1]>
        net (float[N, 5] x, float[5] scale, float[5] b, float[5] mean, float[5] var) => (float[N, 5] y) {
            normalized = mine.Norm <epsilon = 0.5> (x, scale, b, mean, var)
            y = Relu (normalized)
        }
        <domain: "mine", opset_import: ["": 15]>
        Norm <epsilon> (x, scale, b, mean, var) => (y) {
            y = BatchNormalization <epsilon: float = @epsilon> (x, scale, b, mean, var)
        }""")
    c = cases.call((6, 5))
    (y,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds(c))
    fast = onnx.reference.ReferenceEvaluator(model, new_ops=[fastbn.onnx.BatchNormalization])
    np.testing.assert_allclose(fast.run(None, feeds(c))[0], y, rtol=1e-5, atol=1e-6)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_old_opset() -> None:
    c = cases.call((6, 5))
    with pytest.raises(NotImplementedError, match="BatchNormalization: got opset 5; allowed: 6 or later"):
        evaluator(5).run(None, feeds(c))


def test_bad_shapes() -> None:
    c = cases.call((6, 5))
    with pytest.raises(ValueError, match=r"gamma: got shape \(4,\)"):
        evaluator(15).run(None, feeds(c) | {"scale": c.gamma[:4]})


def test_without_onnx(tmp_path: Path) -> None:
    """`import fastbn` works, and the extra is named."""
    script = "import sys; sys.modules['onnx'] = None; import fastbn; print('there'); import fastbn.onnx"
    done = cases.run_python(script, tmp_path)
    assert 'ImportError: fastbn.onnx needs onnx: pip install "fastbn[onnx]"' in done.stderr
    assert done.stdout == "there\n"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples are not beside the tests: no checkout")
def test_example(tmp_path: Path) -> None:
    done = cases.run_python(EXAMPLE.read_text(encoding="utf-8"), tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^fastbn's +at most (\S+) from float64$", done.stdout, flags=re.MULTILINE)
    assert found, done.stdout
    assert float(found[1]) < 1e-6
