"""How does the memory of a tensor become an array, without a copy? By DLPack, a protocol of many array libraries.

https://dmlc.github.io/dlpack/latest has the structures, https://data-apis.org/array-api/latest the methods of objects.
`numpy.from_dlpack` does the same, but not for bfloat16, and before NumPy 2.2.5 its arrays are always read-only.
"""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class SharingError(Exception):
    """What was given, and what is allowed instead of an argument whose name stands where {0} is."""

    def __init__(self, given: str, allowed: str) -> None:
        super().__init__(given)
        self.given, self.allowed = given, allowed


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("device_number", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned of major version 1; earlier ones begin with the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


HOST = (1, 3, 11)
"""The devices whose memory the CPU can use: its own, and what CUDA or ROCm have pinned there."""

READ_ONLY, COPIED = 1, 2
"""The flags of a versioned tensor. What is written to a copy would be lost."""

LETTERS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
"""DLPack's kinds of numbers, and NumPy's. Kind 4 is bfloat16, which NumPy does not have."""

_BFLOAT = 4

LOW = 1 << 32
"""Memory is hardly ever at a lower address. A tensor without memory is: its address is its offset."""

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)


class _Memory:
    """Keeps the memory of a capsule, whose destructor frees it, for an array that NumPy makes of this object."""

    def __init__(self, capsule: object, interface: dict[str, Any]) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


def view(value: Any) -> tuple[Array, bool]:
    """An array on the memory of an object with `__dlpack__`, and whether it is the bits of bfloat16, as uint16.

    Raises `SharingError` for memory that NumPy cannot use, and for tensors that are more than their memory.
    """
    _check_torch(value)
    try:
        device = int(value.__dlpack_device__()[0])
        if device in HOST:
            capsule = _exported(value)
    except Exception as error:  # the library's own, whatever it is
        raise _refused(value, str(error).partition("\n")[0]) from error
    if device not in HOST:
        given = f"{_kind(value)} on another device (number {device} of DLPack)"
        raise SharingError(given, "one in the CPU's memory, such as {0}.cpu()")
    versioned = _is_capsule(capsule, b"dltensor_versioned")
    if versioned:
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise _refused(value, f"version {managed.major} of DLPack")
        tensor, writable = managed.tensor, not managed.flags & (READ_ONLY | COPIED)
    elif _is_capsule(capsule, b"dltensor"):
        # Without a version it may be of a library whose arrays never change, such as JAX. Torch's can be written to.
        tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
        writable = callable(getattr(value, "data_ptr", None))
    else:
        raise _refused(value, f"__dlpack__ returned {_kind(capsule)}")
    return _array(value, capsule, tensor, writable)


def _exported(value: Any) -> object:
    """The capsule of version 1, or of an earlier version where the library has no other."""
    try:
        return value.__dlpack__(max_version=(1, 0))
    except TypeError:
        return value.__dlpack__()


def _array(value: object, capsule: object, tensor: _Tensor, writable: bool) -> tuple[Array, bool]:
    shape = tuple(tensor.shape[: tensor.ndim])
    letter = "u" if tensor.kind == _BFLOAT and tensor.bits == 16 else LETTERS.get(tensor.kind)
    size, lost = divmod(tensor.bits, 8)
    if letter is None or lost or tensor.lanes != 1:
        raise _refused(value, f"kind {tensor.kind} of {tensor.bits} bits is no dtype of NumPy")
    strides = tuple(size * step for step in tensor.strides[: tensor.ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    if math.prod(shape) and address < LOW and not _has_memory(value, address):
        raise SharingError(f"{_kind(value)} without memory", "one whose values are stored")
    order = "<" if sys.byteorder == "little" else ">"
    interface = {
        "version": 3,
        "data": (address, not writable),
        "shape": shape,
        "strides": strides,
        "typestr": f"{order}{letter}{size}",
    }
    return np.asarray(_Memory(capsule, interface)), tensor.kind == _BFLOAT


def _has_memory(value: Any, address: int) -> bool:
    """Whether a low address can be one. Torch's tensors may be fake, freed or zeros that are not stored."""
    try:
        return bool(value.untyped_storage().data_ptr())
    except AttributeError:  # of another library
        return address >= 1 << 16
    except Exception:
        return False


def _check_torch(value: Any) -> None:
    """Refuses tensors of PyTorch that carry derivatives, which would be lost, or a sign that is not in memory."""
    if getattr(value, "requires_grad", False) is True:
        raise SharingError(
            f"{_kind(value)} that requires a gradient",
            "{0}.detach(), or a layer of fastbn.torch, which computes gradients",
        )
    forward_ad = sys.modules.get("torch.autograd.forward_ad")
    torch = sys.modules.get("torch")
    if forward_ad is None or torch is None or not isinstance(value, torch.Tensor):
        return
    if value.is_neg():
        raise SharingError(f"{_kind(value)} that is negated lazily", "{0}.resolve_neg()")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise SharingError(
            f"{_kind(value)} with a tangent", "torch.autograd.forward_ad.unpack_dual({0}).primal, or fastbn.torch"
        )


def _refused(value: object, reason: str) -> SharingError:
    allowed = "a NumPy array, or a dense tensor in the CPU's memory, such as {0}.to_dense() or {0}.cpu()"
    return SharingError(_kind(value), f"{allowed} ({reason})")


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
