"""May tensors of PyTorch be arguments of fastbn's own functions, in their own memory?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from test_checks import assert_refused

import fastbn

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")

KINDS = ("float16", "bfloat16", "float32", "float64")
SHAPE = (6, 3, 4, 2)
NAMES = ("x", "gamma", "beta", "running_mean", "running_var", "residual")


def array_of(tensor: Any) -> Any:
    """A copy, by way of torch's own methods."""
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def tensors(kind: str, statistics: str | None = None, **changed: Any) -> dict[str, Any]:
    """Arguments of forward and infer; gamma and beta are of the statistics dtype, running ones of `statistics`."""
    generator = torch.Generator().manual_seed(0)
    data, wide = getattr(torch, kind), torch.float64 if kind == "float64" else torch.float32
    running = getattr(torch, statistics or kind)
    found = {name: torch.randn(SHAPE, generator=generator).to(data) for name in ("x", "residual")}
    found |= {name: torch.randn(3, generator=generator).to(wide) for name in ("gamma", "beta")}
    found |= {name: (1 + torch.rand(3, generator=generator)).to(running) for name in ("running_mean", "running_var")}
    return found | changed


def placed(tensor: Any, layout: str) -> Any:
    if layout == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.repeat(1, 1, 1, 2)[..., ::2] if layout == "strided" else tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_forward_and_backward(kernel: cases.Kernel, kind: str, layout: str) -> None:
    given = tensors(kind)
    arrays = {name: array_of(tensor) for name, tensor in given.items()}
    given |= {name: placed(given[name], layout) for name in ("x", "residual")}
    mask = torch.ones(SHAPE[0], *SHAPE[2:], dtype=torch.bool)
    mask[1] = False
    out, dy = placed(torch.zeros(SHAPE, dtype=given["x"].dtype), layout), given["residual"] * 2
    if layout != "contiguous":  # in the same memory order, for the same bits
        arrays |= {name: placed(torch.from_numpy(arrays[name].view(f"i{arrays[name].itemsize}")), layout).numpy()
                   .view(arrays[name].dtype) for name in ("x", "residual")}  # fmt: skip
    wanted = fastbn.forward(**arrays, mask=mask.numpy(), activation="silu")
    y, cache = fastbn.forward(**given, mask=mask, activation="silu", out=out)
    assert y is out
    assert array_of(out).tobytes() == np.ascontiguousarray(wanted.y).tobytes()
    for name in NAMES:
        assert array_of(given[name]).tobytes() == np.ascontiguousarray(arrays[name]).tobytes(), name
    assert not torch.equal(given["running_var"], tensors(kind)["running_var"])
    gradients = fastbn.backward(dy, cache, out=out)
    assert gradients.dx is out
    other = fastbn.backward(array_of(dy), wanted.cache)
    assert array_of(out).tobytes() == np.ascontiguousarray(other.dx).tobytes()
    cases.assert_same_bits(gradients[1:], other[1:])
    assert type(gradients.dresidual) is np.ndarray


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistics", KINDS)
def test_running_statistics(any_backend: cases.Kernel, kind: str, statistics: str) -> None:
    """Are updated in the tensor, whatever its dtype; and `infer` takes them."""
    given = tensors(kind, statistics)
    arrays = {name: array_of(tensor) for name, tensor in given.items()}
    addresses = [given[name].data_ptr() for name in ("running_mean", "running_var")]
    fastbn.forward(**arrays)
    fastbn.forward(**given)
    for name in ("running_mean", "running_var"):
        cases.assert_same_bits(array_of(given[name]), arrays[name])
    assert addresses == [given[name].data_ptr() for name in ("running_mean", "running_var")]
    cases.assert_same_bits(fastbn.infer(**given), fastbn.infer(**arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kernel: cases.Kernel, kind: str) -> None:
    given = tensors(kind, gamma=None, beta=None, residual=None)
    wanted = fastbn.infer(**{name: tensor if tensor is None else array_of(tensor) for name, tensor in given.items()})
    assert fastbn.infer(**given, out=given["x"]) is given["x"]
    cases.assert_same_bits(array_of(given["x"]), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_moments_and_fold(any_backend: cases.Kernel, kind: str) -> None:
    statistics = "float64" if kind == "float64" else "float32"
    given = tensors(kind, statistics)
    x, residual = given.pop("x"), given.pop("residual")
    arrays = {name: array_of(tensor) for name, tensor in given.items()}
    plan, out = fastbn.InferencePlan(**given), torch.zeros_like(x)
    assert plan(x, out=out, residual=residual) is out
    cases.assert_same_bits(array_of(out), fastbn.InferencePlan(**arrays)(array_of(x), residual=array_of(residual)))
    given["gamma"].zero_()  # the arrays of a plan are copies
    cases.assert_same_bits(plan(array_of(x)), fastbn.InferencePlan(**arrays)(array_of(x)))
    assert fastbn.moments(x) == fastbn.moments(array_of(x))
    weight = torch.randn(3, 5).to(x.dtype)
    fresh = tensors(kind, statistics)
    got = fastbn.fold(weight, None, *(fresh[name] for name in arrays))
    cases.assert_same_bits(got, fastbn.fold(array_of(weight), None, *arrays.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_layer(any_backend: cases.Kernel, kind: str) -> None:
    """Whose buffers may be those of a torch layer: both are then updated."""
    buffers = torch.nn.BatchNorm2d(3, dtype=getattr(torch, kind))
    bn, other = (fastbn.BatchNorm(3, dtype=kind) for _ in range(2))
    bn.running_mean, bn.running_var = buffers.running_mean, buffers.running_var
    other.running_mean, other.running_var = array_of(buffers.running_mean), array_of(buffers.running_var)
    x = tensors(kind)["x"]
    out = torch.zeros_like(x)
    assert bn(x, out=out) is out
    cases.assert_same_bits(array_of(out), other(array_of(x)))
    cases.assert_same_bits(array_of(buffers.running_var), other.running_var)
    assert bn.backward(x, out=out) is out
    cases.assert_same_bits(array_of(out), other.backward(array_of(x)))
    with pytest.raises(TypeError, match=r"weight: got .*Parameter that requires a gradient; allowed: weight\.detach"):
        bn.weight = buffers.weight
    bn.weight = buffers.weight.detach()
    assert np.shares_memory(bn.weight.view(np.uint8), buffers.weight.detach().view(torch.uint8).numpy())


# Tensors that are more, or less, than memory -------------------------------------------------------------------------


def _fake(x: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(1 << 20, *x.shape)[1 << 19]  # far from the beginning of its storage


def _freed(x: Any) -> Any:
    large = torch.zeros(1 << 12, *x.shape, dtype=x.dtype)
    part = large[1 << 11]
    large.untyped_storage().resize_(0)
    return part


def _shrunk(x: Any) -> Any:
    x.untyped_storage().resize_(x.nbytes - 4)
    return x


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "gradient": (lambda x: x.clone().requires_grad_(), ".detach(), or a layer of fastbn.torch"),
    "result": (lambda x: x.clone().requires_grad_() * 2, ".detach(), or a layer of fastbn.torch"),
    "sparse": (lambda x: x.to_sparse(), ".to_dense()"),
    "sparse rows": (lambda x: x.flatten(1).to_sparse_csr(), ".to_dense()"),
    "meta": (lambda x: x.to("meta"), ".cpu()"),
    "fake": (_fake, "a dense tensor"),
    "freed": (_freed, "one whose values are stored"),
    "zeros": (lambda x: torch._efficientzerotensor(x.shape), "a dense tensor"),
    "shrunk": (_shrunk, "one whose values are stored"),
    "negated": (lambda x: torch.complex(x, x).conj().imag, ".resolve_neg()"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "a dense tensor"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "a dense tensor"),
    "mkldnn": (lambda x: x.to_mkldnn(), "a dense tensor"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), "a dense tensor"),
    "int64": (lambda x: x.long(), "float32"),
}


@pytest.mark.parametrize("name", ["x", "residual", "out"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore")
def test_refused(name: str, kind: str) -> None:
    make, words = BAD[kind]
    given = {key: tensor.numpy() for key, tensor in tensors("float32").items()}
    given["out"] = np.zeros(SHAPE, np.float32)
    given[name] = make(torch.from_numpy(given[name]).clone())
    assert_refused(fastbn.forward, given, TypeError, f"{name}: got ", words)


@pytest.mark.parametrize("name", ["gamma", "running_mean"])
def test_parameters_are_refused(name: str) -> None:
    """Even where gradients are not recorded: to detach them is the caller's decision."""
    given = {key: tensor.numpy() for key, tensor in tensors("float32").items()}
    given[name] = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert_refused(
            fastbn.forward, given, TypeError, f"{name}: got ", f"{name}.detach(), or a layer of fastbn.torch"
        )


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_memory_outlives_the_call(kind: str) -> None:
    """Since torch refuses to free what an array refers to, and a cache keeps the array."""
    x = tensors(kind)["x"]
    cache = fastbn.forward(x).cache
    with pytest.raises(RuntimeError, match="not resizable"):
        x.untyped_storage().resize_(0)
    dy = array_of(x)
    del x
    assert fastbn.backward(dy, cache).dx.shape == dy.shape


@pytest.mark.filterwarnings("ignore")
def test_transforms_are_refused() -> None:
    """Within which a tensor stands for many, or carries derivatives."""
    given = tensors("float32", gamma=None, beta=None, residual=None)
    x = given.pop("x")

    def call(x: Any) -> Any:
        return torch.from_numpy(fastbn.infer(x, **{**given, "residual": None}))

    with pytest.raises(TypeError, match=r"x: got .*allowed: a NumPy array"):
        torch.func.vmap(call)(x[None])
    with pytest.raises(TypeError, match=r"x: got .* requires a gradient; allowed: x\.detach"):
        torch.func.grad(lambda x: call(x).sum())(x)
    with pytest.raises(TypeError, match=r"x: got .* with a tangent; allowed: .*unpack_dual\(x\)\.primal"):
        torch.func.jvp(call, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(TypeError, match=r"x: got .* with a tangent; allowed: .*unpack_dual\(x\)\.primal"):
            call(dual)
        assert call(x).shape == x.shape
    for change in (lambda x: x, lambda x: x.add_(1)):
        with pytest.raises(TypeError, match=r"x: got .*; allowed: "):
            torch.func.functionalize(lambda x, change=change: call(change(x + 0)))(x)


def test_bfloat16_names_its_extra(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['ml_dtypes'] = None; import torch, fastbn; ones = torch.ones(3)\n"
        "print(fastbn.infer(torch.ones(2, 3), None, None, ones, ones).shape)\n"
        "fastbn.infer(torch.ones(2, 3, dtype=torch.bfloat16), None, None, ones, ones)"
    )
    done = cases.run_python(script, tmp_path)
    assert done.stdout == "(2, 3)\n"
    assert 'ImportError: x: "bfloat16" needs ml_dtypes: pip install "fastbn[bfloat16]"' in done.stderr
