"""Does fastbn compute what torch, Keras and ONNX compute?"""

from __future__ import annotations

import os
import warnings
from typing import Any

import cases
import numpy as np
import pytest

import fastbn

Array = np.ndarray[Any, Any]
SHAPES = ((30, 7), (6, 7, 9), (4, 7, 5, 6), (2, 7, 3, 4, 5))
CLOSE: dict[str, dict[str, float]] = {
    "float32": {"rtol": 2e-5, "atol": 2e-5},
    "float64": {"rtol": 1e-11, "atol": 1e-11},
}
"""The peers' errors: fastbn's own are held against the oracle."""


def peer(name: str) -> Any:
    """The peer, or the test is skipped; its own import may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def torch() -> Any:
    module = peer("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def keras() -> Any:
    """On torch, which is the one of its backends that the other tests need as well."""
    peer("torch")
    before = os.environ.setdefault("KERAS_BACKEND", "torch")
    module = peer("keras")
    if module.backend.backend() != "torch":
        pytest.skip(f"keras runs on {before}")
    return module


# torch ---------------------------------------------------------------------------------------------------------------


def tensors(torch: Any, *arrays: Array, gradient: bool = False) -> list[Any]:
    return [torch.from_numpy(array.copy()).requires_grad_(gradient) for array in arrays]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("extra", ["plain", "relu", "relu of residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_batch_norm(
    torch: Any, kernel: cases.Kernel, dtype: str, shape: tuple[int, ...], extra: str, training: bool
) -> None:
    """Outputs, running statistics, and the gradients that autograd finds."""
    c = cases.call(shape, dtype, offset=3)
    mean, var = c.running_mean.copy(), c.running_var.copy()
    t_mean, t_var = tensors(torch, mean, var)
    t_x, t_gamma, t_beta, t_residual = inputs = tensors(torch, c.x, c.gamma, c.beta, c.residual, gradient=True)
    t_y = torch.nn.functional.batch_norm(t_x, t_mean, t_var, t_gamma, t_beta, training, 0.3, 0.01)
    t_y = t_y + t_residual if "residual" in extra else t_y
    t_y = t_y.relu() if "relu" in extra else t_y
    t_y.backward(torch.from_numpy(c.dy))

    y, cache = fastbn.forward(
        c.x, c.gamma, c.beta, mean, var, training=training, momentum=0.3, eps=0.01,
        activation="relu" if "relu" in extra else None, residual=c.residual if "residual" in extra else None,
    )  # fmt: skip
    gradients = fastbn.backward(c.dy, cache)
    close = CLOSE[dtype]
    np.testing.assert_allclose(y, t_y.detach().numpy(), **close)
    np.testing.assert_allclose(mean, t_mean.numpy(), **close)
    np.testing.assert_allclose(var, t_var.numpy(), **close)
    for name, got, tensor in zip(
        ("x", "gamma", "beta", "residual"), (*gradients, gradients.dresidual), inputs, strict=True
    ):
        if tensor.grad is None:
            assert got is None
        else:
            scale = max(1, float(tensor.grad.abs().max()))
            np.testing.assert_allclose(got, tensor.grad.numpy(), close["rtol"], close["atol"] * scale, err_msg=name)


ACTIVATIONS: dict[str, Any] = {
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "leaky_relu with a slope": ("leaky_relu", 0.2),
    "silu": "silu",
    "hardswish": "hardswish",
    "sigmoid": "sigmoid",
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [*cases.DTYPES, *cases.HALVES])
def test_torch_activations(torch: Any, kernel: cases.Kernel, kind: str, activation: str, training: bool) -> None:
    """After batch norm and a residual that spreads over all of their bends; halves with float32 parameters."""
    functional = torch.nn.functional
    chosen = ACTIVATIONS[activation]
    close = CLOSE.get(kind, {"rtol": 1e-2, "atol": 1e-2} if kind == "float16" else {"rtol": 1e-1, "atol": 5e-2})
    for shape in ((6, 7, 9), (4, 7, 5, 6)):
        c = cases.call(shape, kind)
        c = c._replace(residual=(4 * c.residual.astype(np.float64)).astype(kind))
        mean, var = c.running_mean.copy(), c.running_var.copy()
        t_mean, t_var, t_gamma, t_beta = tensors(torch, mean, var, c.gamma, c.beta)
        t_x, t_residual = (_half_tensor(torch, array).requires_grad_() for array in (c.x, c.residual))
        t_gamma.requires_grad_()
        t_z = functional.batch_norm(t_x, t_mean, t_var, t_gamma, t_beta, training, 0.3, 0.01) + t_residual
        function = torch.sigmoid if activation == "sigmoid" else getattr(functional, activation.split()[0])
        t_y = function(t_z, chosen[1]) if isinstance(chosen, tuple) else function(t_z)
        z = t_z.detach().double().numpy()  # which torch rounds to a half: perhaps to the other side of a kink
        near = abs(z[..., np.newaxis] - (-3, 0, 3, 6)).min(axis=-1) < 0.05
        dy = np.where(near, np.zeros_like(c.dy), c.dy)
        t_y.backward(_half_tensor(torch, dy))

        y, cache = fastbn.forward(
            c.x, c.gamma, c.beta, mean, var, training=training, momentum=0.3, eps=0.01, activation=chosen,
            residual=c.residual,
        )  # fmt: skip
        got = fastbn.backward(dy, cache)
        np.testing.assert_allclose(var, t_var.numpy(), rtol=1e-5)
        for name, ours, theirs in (
            ("y", y, t_y.detach()),
            ("dx", got.dx, t_x.grad),
            ("dresidual", got.dresidual, t_residual.grad),
            ("dgamma", got.dgamma, t_gamma.grad),
        ):
            wide = theirs.double().numpy()
            scale = max(1, abs(wide).max())
            np.testing.assert_allclose(
                ours.astype(np.float64), wide, close["rtol"], close["atol"] * scale, err_msg=f"{name} for {shape}"
            )


def _half_tensor(torch: Any, array: Array) -> Any:
    """A tensor of the array's dtype, for bfloat16 as well."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def test_torch_batch_norm_without_parameters(torch: Any, kernel: cases.Kernel) -> None:
    c = cases.call((6, 7, 9), "float64")
    (t_x,) = tensors(torch, c.x, gradient=True)
    t_y = torch.nn.functional.batch_norm(t_x, None, None, training=True)
    t_y.backward(torch.from_numpy(c.dy))
    y, cache = fastbn.forward(c.x)
    np.testing.assert_allclose(y, t_y.detach().numpy(), **CLOSE["float64"])
    np.testing.assert_allclose(fastbn.backward(c.dy, cache).dx, t_x.grad.numpy(), **CLOSE["float64"])


LAYERS = {"BatchNorm1d": (30, 7), "BatchNorm2d": (4, 7, 5, 6), "BatchNorm3d": (2, 7, 3, 4, 5)}
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "momentum": {"momentum": 0.3, "eps": 0.01},
    "cumulative": {"momentum": None},
    "no parameters": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}


def compare_layers(torch: Any, theirs: Any, ours: fastbn.BatchNorm, shape: tuple[int, ...], seeds: range) -> None:
    """Both layers over several batches, and then after training."""
    for seed in seeds:
        c = cases.call(shape, seed=seed, offset=seed)
        for mode in (True, False):
            theirs.train(mode)
            ours.train(mode)
            (t_x,) = tensors(torch, c.x, gradient=True)
            t_y = theirs(t_x)
            theirs.zero_grad()
            t_y.backward(torch.from_numpy(c.dy))
            np.testing.assert_allclose(ours(c.x), t_y.detach().numpy(), **CLOSE["float32"])
            np.testing.assert_allclose(ours.backward(c.dy), t_x.grad.numpy(), **CLOSE["float32"])
            for name, parameter in theirs.named_parameters():
                np.testing.assert_allclose(
                    ours.gradients()[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-4, err_msg=name
                )
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert state[name].dtype == tensor.numpy().dtype
        assert state[name].shape == tuple(tensor.shape)
        np.testing.assert_allclose(state[name], tensor.numpy(), **CLOSE["float32"], err_msg=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_torch_layer(torch: Any, layer: str, options: str) -> None:
    """As the torch layer of the same options, from the first batch on."""
    theirs = getattr(torch.nn, layer)(7, **OPTIONS[options])
    compare_layers(torch, theirs, fastbn.BatchNorm(7, **OPTIONS[options]), LAYERS[layer], range(3))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_torch_state(torch: Any, layer: str, options: str) -> None:
    """States go both ways, and the layers go on alike."""
    shape = LAYERS[layer]
    theirs, ours = getattr(torch.nn, layer)(7, **OPTIONS[options]), fastbn.BatchNorm(7, **OPTIONS[options])
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    theirs(torch.from_numpy(cases.call(shape, seed=8).x))
    ours.load_state_dict(theirs.state_dict())
    compare_layers(torch, theirs, ours, shape, range(2))

    back = getattr(torch.nn, layer)(7, **OPTIONS[options])
    state = {name: torch.from_numpy(np.asarray(array)) for name, array in ours.state_dict().items()}
    back.load_state_dict(state)
    for name, tensor in back.state_dict().items():
        assert np.array_equal(tensor.numpy(), ours.state_dict()[name])


def test_tensors_are_arrays(torch: Any) -> None:
    """On the CPU and without a gradient, NumPy takes them; others are refused in words."""
    c = cases.call((6, 7))
    cases.assert_same_bits(fastbn.forward(torch.from_numpy(c.x)).y, fastbn.forward(c.x).y)
    with pytest.raises(TypeError, match="x: "):
        fastbn.forward(torch.from_numpy(c.x).requires_grad_())


# Keras ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, on torch
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "epsilon": 0.01}], ids=["usual", "others"])
def test_keras_layer(keras: Any, kernel: cases.Kernel, options: dict[str, Any], axis: int) -> None:
    """Outputs and moving statistics of several steps, then inference. Its defaults are those of the real layer."""
    shape = (6, 5, 4, 7) if axis == -1 else (6, 7, 5, 4)
    theirs = keras.layers.BatchNormalization(axis=axis, **options)
    theirs.build(shape)
    ours = fastbn.BatchNorm.keras(7, axis=axis, **options)
    c = cases.call(shape, axis=axis)
    theirs.gamma.assign(c.gamma)
    theirs.beta.assign(c.beta)
    ours.weight[...], ours.bias[...] = c.gamma, c.beta

    def numpy(tensor: Any) -> Array:
        return np.asarray(keras.ops.convert_to_numpy(tensor))

    for seed in range(4):
        x = cases.call(shape, axis=axis, seed=seed, offset=seed).x
        np.testing.assert_allclose(ours.train()(x), numpy(theirs(x, training=True)), **CLOSE["float32"])
        np.testing.assert_allclose(ours.running_mean, numpy(theirs.moving_mean), **CLOSE["float32"])
        np.testing.assert_allclose(ours.running_var, numpy(theirs.moving_variance), **CLOSE["float32"])
        np.testing.assert_allclose(ours.eval()(x), numpy(theirs(x, training=False)), **CLOSE["float32"])


def test_keras_defaults(keras: Any) -> None:
    theirs, ours = keras.layers.BatchNormalization(), fastbn.BatchNorm.keras(7)
    assert (theirs.axis, theirs.epsilon) == (ours.axis, ours.eps)
    assert ours.momentum == pytest.approx(1 - theirs.momentum, rel=1e-12)


# ONNX ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "epsilon": 0.01}], ids=["usual", "others"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2], ids=str)
def test_onnx_operator(kernel: cases.Kernel, shape: tuple[int, ...], options: dict[str, float]) -> None:
    """Outputs and running statistics of the reference evaluator over several steps, then inference."""
    ours = fastbn.BatchNorm.onnx(7, **options)
    c = cases.call(shape)
    ours.weight[...], ours.bias[...] = c.gamma, c.beta
    mean, var = ours.running_mean.copy(), ours.running_var.copy()
    training, inference = _onnx_evaluator(1, options), _onnx_evaluator(0, options)
    for seed in range(4):
        x = cases.call(shape, seed=seed, offset=seed).x
        y, mean, var = training.run(None, {"x": x, "scale": c.gamma, "b": c.beta, "mean": mean, "var": var})
        np.testing.assert_allclose(ours.train()(x), y, **CLOSE["float32"])
        np.testing.assert_allclose(ours.running_mean, mean, **CLOSE["float32"])
        np.testing.assert_allclose(ours.running_var, var, **CLOSE["float32"])
        (y,) = inference.run(None, {"x": x, "scale": c.gamma, "b": c.beta, "mean": mean, "var": var})
        np.testing.assert_allclose(ours.eval()(x), y, **CLOSE["float32"])


def _onnx_evaluator(training: int, options: dict[str, float]) -> Any:
    onnx, reference = peer("onnx"), peer("onnx.reference")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    inputs = ["x", "scale", "b", "mean", "var"]
    outputs = ["y", "new_mean", "new_var"] if training else ["y"]
    node = helper.make_node("BatchNormalization", inputs, outputs, training_mode=training, **options)
    values = [[helper.make_tensor_value_info(name, kind, None) for name in names] for names in (inputs, outputs)]
    graph = helper.make_graph([node], "batch_norm", *values)
    return reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)]))


def test_onnx_defaults() -> None:
    """Those of the operator's schema."""
    onnx = peer("onnx")
    attributes = onnx.defs.get_schema("BatchNormalization", 15).attributes
    ours = fastbn.BatchNorm.onnx(7)
    assert ours.eps == pytest.approx(attributes["epsilon"].default_value.f, rel=1e-6)
    assert ours.momentum == pytest.approx(1 - attributes["momentum"].default_value.f, rel=1e-6)
