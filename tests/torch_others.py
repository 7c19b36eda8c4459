"""Norms of the same make as timm's and torchvision's, for tests that need neither library."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from torch_cases import torch

nn = torch.nn


class BatchNormAct2d(nn.BatchNorm2d):  # type: ignore[misc]
    """timm's: a norm, a drop layer and an activation."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, act: Any = None, drop: Any = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Any) -> Any:
        return self.act(self.drop(super().forward(x)))


def frozen(layer: Any, num_features: int, eps: float) -> None:
    """Gives a layer the buffers of a frozen norm."""
    layer.eps = eps
    for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        layer.register_buffer(name, torch.full((num_features,), value))


def by_buffers(layer: Any, x: Any) -> Any:
    """The formula of a frozen norm."""
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (getattr(layer, name).reshape(1, -1, 1, 1) for name in names)
    scale = weight * (var + layer.eps).rsqrt()
    return x * scale + (bias - mean * scale)


class FrozenBatchNorm2d(nn.Module):  # type: ignore[misc]
    """torchvision's: four buffers, in training, too."""

    __module__ = "torchvision.ops.misc"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        frozen(self, num_features, eps)

    def forward(self, x: Any) -> Any:
        return by_buffers(self, x)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.weight.shape[0]}, eps={self.eps})"


class FrozenBatchNormAct2d(nn.Module):  # type: ignore[misc]
    """timm's."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, act: Any = None, drop: Any = None) -> None:
        super().__init__()
        frozen(self, num_features, 1e-5)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Any) -> Any:
        return self.act(self.drop(by_buffers(self, x)))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles find the classes where the libraries have them."""
    for layer in (BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d):
        parts = layer.__module__.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[layer.__module__], layer.__name__, layer, raising=False)
