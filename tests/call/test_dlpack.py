"""May objects that offer their memory by DLPack be arguments and `out`? Here with NumPy alone."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from test_checks import assert_refused

import fastbn

if np.lib.NumpyVersion(np.__version__) < "2.1.0":
    pytest.skip("NumPy exports DLPack 1 since version 2.1", allow_module_level=True)

Array = np.ndarray[Any, Any]
SHAPE = (6, 3, 4)
NAMES = ("x", "gamma", "beta", "running_mean", "running_var", "residual")


class Exporter:
    """An object that has nothing but the protocol, and the memory of an array."""

    def __init__(self, array: Array, device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


class Old(Exporter):
    """One of before version 1, whose tensors do not tell whether they may be written to."""

    def __dlpack__(self) -> object:  # type: ignore[override]
        return self.array.__dlpack__()


def arguments(kind: str = "float32") -> dict[str, Any]:
    c = cases.call(SHAPE, kind)
    return {name: getattr(c, name).copy() for name in NAMES}


def mask() -> Array:
    return cases.random_mask(SHAPE)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_forward_and_backward(kernel: cases.Kernel, kind: str) -> None:
    """The same bits as with arrays, in the same memory; running statistics are updated there."""
    arrays, given = arguments(kind), arguments(kind)
    dy = cases.call(SHAPE, kind).dy
    out, dx = (np.zeros(SHAPE, kind) for _ in range(2))
    options: dict[str, Any] = {"activation": "relu"}
    wanted = fastbn.forward(**arrays, mask=mask(), **options)
    place = Exporter(out)
    exported = {name: Exporter(array) for name, array in given.items()}
    y, cache = fastbn.forward(**exported, mask=Exporter(mask()), out=place, **options)
    assert y is place
    cases.assert_same_bits(out, wanted.y)
    for name in NAMES:
        cases.assert_same_bits(given[name], arrays[name])
    assert not np.array_equal(given["running_mean"], arguments(kind)["running_mean"])
    gradients = fastbn.backward(dy, wanted.cache)
    place = Exporter(dx)
    got = fastbn.backward(Exporter(dy), cache, out=place)
    assert got.dx is place
    cases.assert_same_bits((dx, *got[1:], got.dresidual), (*gradients, gradients.dresidual))
    sums = fastbn.backward_sums(Exporter(dy), cache)
    assert sums == fastbn.backward_sums(dy, wanted.cache)


def test_infer_and_plan(kernel: cases.Kernel) -> None:
    arrays = arguments()
    wanted = fastbn.infer(**arrays)
    exported = {name: Exporter(array) for name, array in arrays.items()}
    y = fastbn.infer(**exported)
    assert type(y) is np.ndarray
    cases.assert_same_bits(y, wanted)
    x, residual = exported.pop("x"), exported.pop("residual")
    plan = fastbn.InferencePlan(**exported)
    out = Exporter(np.zeros_like(wanted))
    assert plan(x, out=out, residual=residual) is out
    cases.assert_same_bits(out.array, wanted)
    assert fastbn.infer(out, **exported, out=out) is out  # in place
    cases.assert_same_bits(out.array, plan(wanted))


def test_moments_and_fold(any_backend: cases.Kernel) -> None:
    arrays = arguments()
    m = fastbn.moments(Exporter(arrays["x"]), mask=Exporter(mask()))
    assert m == fastbn.moments(arrays["x"], mask=mask())
    assert fastbn.Moments(m.count, Exporter(m.mean), Exporter(m.m2)) == fastbn.Moments(m.count, m.mean, m.m2)
    norm = [arrays[name] for name in NAMES[1:5]]
    weight = np.ones((3, 2), np.float32)
    wanted = fastbn.fold(weight, None, *norm)
    got = fastbn.fold(Exporter(weight), Exporter(np.zeros(3)), *map(Exporter, norm))
    cases.assert_same_bits(got, wanted)


def test_layer(kernel: cases.Kernel) -> None:
    """Its attributes are then arrays on the memory that was given."""
    arrays = arguments()
    bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    mean = np.zeros(3, np.float32)
    bn.running_mean, bn.weight = Exporter(mean), Exporter(arrays["gamma"])
    other.weight = arrays["gamma"]
    assert type(bn.running_mean) is np.ndarray
    out = Exporter(np.zeros_like(arrays["x"]))
    dy = cases.call(SHAPE).dy
    assert bn(Exporter(arrays["x"]), out=out) is out
    cases.assert_same_bits(out.array, other(arrays["x"]))
    cases.assert_same_bits(mean, other.running_mean)
    assert bn.backward(Exporter(dy), out=out) is out
    cases.assert_same_bits(out.array, other.backward(dy))
    state = {name: Exporter(array) for name, array in other.state_dict().items()}
    bn.load_state_dict(state)
    cases.assert_same_bits(mean, other.running_mean)


@pytest.mark.parametrize("placement", [name for name in cases.PLACEMENTS if name != "byteswapped"])
def test_strides(placement: str) -> None:
    """Those of DLPack count elements. A read-only input stays what it is."""
    c = cases.call((4, 3, 2, 5))
    x = cases.PLACEMENTS[placement](c.x)
    y = fastbn.infer(Exporter(x), None, None, c.running_mean, c.running_var)
    cases.assert_same_bits(y, fastbn.infer(x, None, None, c.running_mean, c.running_var))
    assert y.strides == fastbn.infer(x, None, None, c.running_mean, c.running_var).strides


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    ones = np.ones(shape[1], np.float32)
    y = fastbn.infer(Exporter(np.zeros(shape, np.float32)), None, None, ones, ones)
    assert y.shape == shape


def test_memory_is_kept_and_freed() -> None:
    """As long as a cache needs it, and no longer."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    before = sys.getrefcount(x)
    cache = fastbn.forward(Exporter(x)).cache
    assert np.shares_memory(cache._parts.x, x)
    assert sys.getrefcount(x) > before
    del cache
    assert sys.getrefcount(x) == before


def test_older_protocol() -> None:
    """Its memory can be read; whether it may be written to is not known."""
    arrays = arguments()
    old = {name: Old(array) for name, array in arrays.items()}
    wanted = fastbn.infer(**arrays)
    cases.assert_same_bits(fastbn.infer(**old), wanted)
    out = np.zeros_like(wanted)
    assert_refused(fastbn.infer, {**old, "out": Old(out)}, ValueError, "out", "read-only", "writable")
    assert_refused(fastbn.forward, old, ValueError, "running_mean", "read-only", "writable")
    assert not out.any()


def test_read_only() -> None:
    arrays = arguments()
    frozen = np.zeros(SHAPE, np.float32)
    frozen.flags.writeable = False
    bad = {**arrays, "out": Exporter(frozen)}
    assert_refused(fastbn.infer, bad, ValueError, "out", "read-only", "writable")
    arrays["running_var"].flags.writeable = False
    bad = {**arrays, "running_var": Exporter(arrays["running_var"])}
    assert_refused(fastbn.forward, bad, ValueError, "running_var", "read-only", "writable")


def test_shared_memory() -> None:
    """Is found as between arrays."""
    arrays = arguments()
    both = Exporter(arrays["x"])
    bad = {**arrays, "residual": both, "out": Exporter(arrays["x"])}
    assert_refused(fastbn.infer, bad, ValueError, "out", "memory shared with residual")
    bad = {**arrays, "running_mean": Exporter(arrays["gamma"])}
    assert_refused(fastbn.forward, bad, ValueError, "running_mean", "memory shared with gamma")


ARGUMENTS = (*NAMES, "out")


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("call", [fastbn.forward, fastbn.infer])
def test_other_devices(call: Any, name: str) -> None:
    given = {**arguments(), "out": np.zeros(SHAPE, np.float32)}
    given[name] = Exporter(given[name], device=2)
    words = (f"{name}: got ", "Exporter on another device (number 2 of DLPack)", f"{name}.cpu()")
    assert_refused(call, given, TypeError, *words)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_gradients_are_not_lost(name: str) -> None:
    given = {**arguments(), "out": np.zeros(SHAPE, np.float32)}
    given[name] = Exporter(given[name])
    given[name].requires_grad = True
    words = (f"{name}: got ", "Exporter that requires a gradient", f"{name}.detach()", "fastbn.torch")
    assert_refused(fastbn.forward, given, TypeError, *words)


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.zeros(SHAPE, np.int32), TypeError, ("dtype int32", "float32")),
        (np.zeros(SHAPE, np.complex64), TypeError, ("dtype complex64", "float32")),
        (np.zeros(SHAPE, bool), TypeError, ("dtype bool", "float32")),
        (np.zeros(6, np.float32), ValueError, ("shape (6,)", "2 dimensions")),
        (np.zeros(SHAPE, object), TypeError, ("Exporter", "a dense tensor in the CPU's memory")),
    ],
)
def test_wrong_contents(array: Array, error: type[Exception], words: tuple[str, ...]) -> None:
    given = {**arguments(), "x": Exporter(array)}
    assert_refused(fastbn.infer, given, error, "x: got ", *words)


class Broken(Exporter):
    """Something else than the protocol asks for."""

    def __dlpack__(self, **options: Any) -> object:
        return "a capsule"


class Without(Broken):
    """Half of the protocol."""

    __dlpack_device__ = None  # type: ignore[assignment]


class Raising(Exporter):
    def __dlpack__(self, **options: Any) -> object:
        raise BufferError("not today {0}")


@pytest.mark.parametrize(
    ("kind", "why"), [(Broken, "returned builtins.str"), (Without, "NoneType"), (Raising, "not today")]
)
def test_broken_protocol(kind: type[Exporter], why: str) -> None:
    given = {**arguments(), "x": kind(np.zeros(SHAPE, np.float32))}
    assert_refused(fastbn.infer, given, TypeError, "x: got ", kind.__name__, why)


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Edited(Exporter):
    """Writes another number into a field of the tensor that is exported."""

    def __init__(self, array: Array, position: int, value: int) -> None:
        super().__init__(array)
        self.position, self.value = position, value

    def __dlpack__(self, **options: Any) -> object:
        capsule = self.array.__dlpack__(max_version=(1, 0))
        ctypes.c_uint8.from_address(_pointer(capsule, b"dltensor_versioned") + self.position).value = self.value
        return capsule


@pytest.mark.parametrize(
    ("position", "value", "why"),
    [
        (0, 2, "version 2"),
        (32 + 20, 9, "kind 9 of 32 bits"),
        (32 + 21, 4, "kind 2 of 4 bits"),
        (32 + 22, 4, "kind 2 of 32 bits"),
    ],
    ids=["major version", "kind", "bits", "lanes"],
)
def test_tensors_that_numpy_has_not(position: int, value: int, why: str) -> None:
    given = {**arguments(), "x": Edited(np.zeros(SHAPE, np.float32), position, value)}
    assert_refused(fastbn.infer, given, TypeError, "x: got ", "Edited", why)


def test_tensor_that_is_a_copy() -> None:
    """Is as good as any to read from; what is written to it would be lost."""
    arrays = arguments()
    copied = 24, 2  # the flags
    cases.assert_same_bits(fastbn.infer(**{**arrays, "x": Edited(arrays["x"], *copied)}), fastbn.infer(**arrays))
    given = {**arrays, "out": Edited(np.zeros(SHAPE, np.float32), *copied)}
    assert_refused(fastbn.infer, given, ValueError, "out", "read-only", "writable")


class Nowhere(Exporter):
    """At an offset from the address 0, as tensors are whose memory was freed."""

    def __dlpack__(self, **options: Any) -> object:
        capsule = self.array.__dlpack__(max_version=(1, 0))
        ctypes.c_void_p.from_address(_pointer(capsule, b"dltensor_versioned") + 32).value = 24
        return capsule


def test_tensor_without_memory() -> None:
    given = {**arguments(), "x": Nowhere(np.zeros(SHAPE, np.float32))}
    assert_refused(fastbn.infer, given, TypeError, "x: got ", "Nowhere without memory")


def test_nothing_is_imported(tmp_path: Path) -> None:
    """For arrays, and by `import fastbn`."""
    script = "import sys, numpy as np, fastbn; fastbn.forward(np.ones((3, 2)), mask=np.ones(3, bool))"
    done = cases.run_python(script + "; print('fastbn.call.dlpack' in sys.modules, 'torch' in sys.modules)", tmp_path)
    assert done.stdout == "False False\n", done.stderr
