"""What do the tests of fastbn.torch share? Layers in pairs, data, and the comparison of two passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

with warnings.catch_warnings():  # torch's own import may warn
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    import fastbn.torch
    from fastbn.torch import autograd, layers, tensors

SHAPES = {1: (6, 5, 7), 2: (4, 5, 6, 3), 3: (3, 5, 2, 4, 3)}
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
PLACES = [(1, "contiguous"), (2, "contiguous"), (2, "channels_last"), (3, "contiguous"), (3, "channels_last_3d")]
DTYPES = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}
"""And their eps: torch's errors, to which fastbn's are held elsewhere."""
ACTIVATIONS = {
    "relu": torch.nn.ReLU(),
    "relu6": torch.nn.ReLU6(),
    "leaky_relu": torch.nn.LeakyReLU(),
    ("leaky_relu", 0.3): torch.nn.LeakyReLU(0.3),
    "silu": torch.nn.SiLU(),
    "hardswish": torch.nn.Hardswish(),
    "sigmoid": torch.nn.Sigmoid(),
}


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Torch's seed and threads, which are the process's: for every test of a file that imports this."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def without_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on calls run as in a version of torch that lacks DLPack's exchange API."""
    for module in (layers, tensors):
        monkeypatch.setattr(module, "bridged", None)
    monkeypatch.setattr(autograd.Normalization, "forward", staticmethod(autograd._forward))
    monkeypatch.setattr(autograd, "_node_backward", autograd._backward)
    monkeypatch.setattr(autograd.Normalization._backward_cls, "apply", autograd._backward)


def randomized(layer: Any) -> Any:
    """With parameters and statistics other than a new layer's."""
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return layer


def pair(ndim: int, channels: int = 5, *, activation: Any = None, **options: Any) -> tuple[Any, Any]:
    """Torch's layer and fastbn's, in one state."""
    theirs = randomized(getattr(torch.nn, f"BatchNorm{ndim}d")(channels, **options))
    ours = getattr(fastbn.torch, f"BatchNorm{ndim}d")(channels, activation=activation, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def data(shape: tuple[int, ...], place: str = "contiguous", dtype: Any = torch.float32) -> Any:
    return torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[place])


def called(layer: Any, x: Any, dy: Any, after: Any = None) -> dict[str, Any]:
    """The output, the gradients and the buffers, of one pass each way."""
    x = x.detach().requires_grad_()
    y = layer(x) if after is None else after(layer(x))
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_agree(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype, name
        assert ours[name].shape == wanted.shape, name
        assert ours[name].stride() == wanted.stride(), name
        torch.testing.assert_close(
            ours[name], wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class Residual(torch.nn.Module):  # type: ignore[misc]
    """Two convolutions, with their norms, and the input beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList([torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])
        self.norms = torch.nn.ModuleDict({name: torch.nn.BatchNorm2d(channels) for name in ("first", "second")})

    def forward(self, x: Any) -> Any:
        z = torch.relu(self.norms["first"](self.inner[0](x)))
        return torch.relu(self.norms["second"](self.inner[1](z)) + x)


def network() -> Any:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        Residual(8),
        torch.nn.Sequential(Residual(8), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 6), torch.nn.BatchNorm1d(6)),
    )


def images() -> tuple[Any, Any]:
    """A batch for the network, in float64, and labels."""
    some = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=some), torch.randint(6, (16,), generator=some)
