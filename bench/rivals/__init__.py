"""Which peers are timed? The peers by name, which of them are installed, and how to install the others."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from ..problem import Contestant, Problem, Variant


class Rival(Protocol):
    """A peer's library, loaded. Each module here has a class Rival; creating it raises ImportError without the library.

    A rival is given every pass, layout, dtype and thread count, and prepares nothing for those that it does not
    support. Only the rivals of WITH_ACTIVATIONS get activations, and no rival gets arrays that are not dense, a mask or
    a residual.
    """

    version: str
    notes: tuple[str, ...]

    def set_threads(self, threads: int) -> None:
        """Sets the number of threads of the contestants that are prepared from now on."""

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        """The contestants for one pass; empty if the peer does not support it."""


@dataclass(frozen=True)
class _Entry:
    title: str
    module: str
    packages: str


ENTRIES = {
    "torch": _Entry("PyTorch", "pytorch", "torch"),
    "torch.compile": _Entry("torch.compile", "inductor", "torch"),
    "onednn": _Entry("oneDNN", "onednn", "onednn"),
    "onnxruntime": _Entry("ONNX Runtime", "ort", "onnxruntime onnx"),
    "openvino": _Entry("OpenVINO", "openvino_cpu", "openvino"),
    "jax": _Entry("JAX", "jax_xla", "jax"),
    "keras": _Entry("Keras", "keras_layer", "keras torch"),
    "numpy": _Entry("NumPy", "numpy_ufuncs", "numpy"),
}

WITH_ACTIVATIONS = ("PyTorch", "torch.compile")

CONTESTANTS = (
    "torch",
    "torch reused",
    "torch.compile",
    "oneDNN",
    "oneDNN blocked",
    "ONNX Runtime",
    "OpenVINO",
    "JAX",
    "Keras",
    "NumPy naive",
    "NumPy careful",
)
"""Every contestant that a rival may prepare, in the order of tables and pictures."""


def lacks(title: str, variant: Variant) -> str:
    """The part of the variant that this peer is not timed with, in words; empty if it is timed."""
    if variant.strides != "dense":
        return "arrays that are not dense"
    if variant.mask or variant.residual:
        return "a mask" if variant.mask else "a residual"
    if title == "torch.compile" and variant.activation == "none":
        return "a norm alone, which nothing is fused with"
    return "" if variant.activation == "none" or title in WITH_ACTIVATIONS else "activations"


@dataclass(frozen=True)
class Loaded:
    """The peers that are installed, by title, and a sentence for each that is not."""

    rivals: dict[str, Rival]
    missing: list[str]


def load(names: Sequence[str]) -> Loaded:
    """Loads the peers of these names; ["all"] means all of them."""
    wanted = list(ENTRIES) if list(names) == ["all"] else list(names)
    unknown = [name for name in wanted if name not in ENTRIES]
    if unknown:
        raise ValueError(f"--peers: got {', '.join(unknown)}; allowed: all, {', '.join(ENTRIES)}")
    loaded = Loaded({}, [])
    for name in wanted:
        entry = ENTRIES[name]
        try:
            module = importlib.import_module(f".{entry.module}", __name__)
            loaded.rivals[entry.title] = cast(Rival, module.Rival())
        except (ImportError, OSError) as error:
            loaded.missing.append(f"{entry.title} ({error}); pip install {entry.packages}")
    return loaded
