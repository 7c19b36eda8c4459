"""Who else is there? The peers by name: which are installed, and how to have those that are not."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from ..problem import Contestant, Problem, Variant


class Rival(Protocol):
    """A peer's library, loaded. Each module here has a class Rival; creating it raises ImportError without the library.

    A rival is given every pass, layout, dtype and thread count, and prepares nothing for those that it does not do.
    Activations are for those of WITH_ACTIVATIONS, and arrays that are not dense for none.
    """

    version: str
    notes: tuple[str, ...]

    def set_threads(self, threads: int) -> None:
        """The number of threads that contestants prepared from now on run with."""

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        """The contestants for one pass; none if the peer does not do it."""


@dataclass(frozen=True)
class _Entry:
    title: str
    module: str
    packages: str


ENTRIES = {
    "torch": _Entry("PyTorch", "pytorch", "torch"),
    "onednn": _Entry("oneDNN", "onednn", "onednn-cpu-gomp"),
    "onnxruntime": _Entry("ONNX Runtime", "ort", "onnxruntime onnx"),
    "openvino": _Entry("OpenVINO", "openvino_cpu", "openvino"),
    "jax": _Entry("JAX", "jax_xla", "jax"),
    "keras": _Entry("Keras", "keras_layer", "keras torch"),
    "numpy": _Entry("NumPy", "numpy_ufuncs", "numpy"),
}

WITH_ACTIVATIONS = ("PyTorch",)

CONTESTANTS = (
    "torch",
    "torch reused",
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
    """What of the variant that peer has no contestants for; nothing if it has them."""
    if variant.strides != "dense":
        return "arrays that are not dense"
    return "" if variant.activation == "none" or title in WITH_ACTIVATIONS else "activations"


@dataclass(frozen=True)
class Loaded:
    """The peers that are here, by title, and a sentence for each that is not."""

    rivals: dict[str, Rival]
    missing: list[str]


def load(names: Sequence[str]) -> Loaded:
    """Loads the peers of these names; ["all"] means each."""
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
