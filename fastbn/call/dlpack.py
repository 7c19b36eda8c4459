"""How does the memory of another library's array become a NumPy array, without a copy?

By DLPack, a protocol of many libraries. https://dmlc.github.io/dlpack/latest has its structures, and
https://data-apis.org/array-api/latest the methods of objects. `numpy.from_dlpack` does the same, but not for bfloat16,
and before NumPy 2.2.5 its arrays are always read-only. Tensors of PyTorch become arrays by their own methods.
"""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any, NoReturn

import numpy as np

from .dtypes import bfloat16

Array = np.ndarray[Any, Any]


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

LOW = 1 << 16
"""No system has memory at a lower address."""

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)


class _Memory:
    """Keeps the memory of a capsule, whose destructor frees it, for an array that NumPy makes of this object."""

    __array_interface__: dict[str, Any]

    def __init__(self, capsule: object) -> None:
        self.capsule = capsule


def array_of(name: str, value: Any) -> Array:
    """An array on the memory of a tensor, or of another object with `__dlpack__`: the argument of this name.

    Raises TypeError for memory that NumPy cannot use, and for tensors that are more than their memory.
    """
    if getattr(value, "requires_grad", False) is True:
        allowed = f"{name}.detach(), or a layer of fastbn.torch, which computes gradients"
        _refuse(name, f"{_kind(value)} that requires a gradient", allowed)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(name, value, torch)
    return _of_capsule(name, value)


# By torch's own methods ----------------------------------------------------------------------------------------------


def _of_torch(name: str, tensor: Any, torch: Any) -> Array:
    """By the method `numpy`, after which torch does not free the storage, as it may after `__dlpack__`."""
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        allowed = f"torch.autograd.forward_ad.unpack_dual({name}).primal, or a layer of fastbn.torch"
        _refuse(name, f"{_kind(tensor)} with a tangent", allowed)
    try:
        is_bfloat16 = tensor.dtype is torch.bfloat16
        array: Array = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
        storage = tensor.untyped_storage()
        first, size = storage.data_ptr(), storage.nbytes()
    except Exception as error:  # the tensor has no memory, or not in a form that NumPy has
        how = f"{name}.resolve_neg()" if "negative bit" in str(error) else f"{name}.to_dense() or {name}.cpu()"
        _refuse_tensor(name, tensor, how, error)
    start = array.__array_interface__["data"][0]
    end = start + array.itemsize + sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))
    if array.size and not 0 < first <= start < end <= first + size:
        _refuse(name, f"{_kind(tensor)} without memory", "one whose values are stored")
    return array.view(bfloat16(name)) if is_bfloat16 else array


# By DLPack -----------------------------------------------------------------------------------------------------------


def _of_capsule(name: str, value: Any) -> Array:
    try:
        device = int(value.__dlpack_device__()[0])
        if device in HOST:
            capsule = _exported(value)
    except Exception as error:  # the library's own, whatever it is
        _refuse_tensor(name, value, f"{name}.cpu()", error)
    if device not in HOST:
        given = f"{_kind(value)} on another device (number {device} of DLPack)"
        _refuse(name, given, f"one in the CPU's memory, such as {name}.cpu()")
    if _is_capsule(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            _refuse_tensor(name, value, f"{name}.cpu()", f"version {managed.major} of DLPack")
        tensor, writable = managed.tensor, not managed.flags & (READ_ONLY | COPIED)
    elif _is_capsule(capsule, b"dltensor"):
        # Without a version, it may be of a library whose arrays never change, such as JAX.
        tensor, writable = _Tensor.from_address(_pointer(capsule, b"dltensor")), False
    else:
        _refuse_tensor(name, value, f"{name}.cpu()", f"__dlpack__ returned {_kind(capsule)}")
    return _array(name, value, _Memory(capsule), tensor, writable)


def _exported(value: Any) -> object:
    """The capsule of version 1, or of an earlier version where the library has no other."""
    try:
        return value.__dlpack__(max_version=(1, 0))
    except TypeError:
        return value.__dlpack__()


def _array(name: str, value: object, memory: _Memory, tensor: _Tensor, writable: bool) -> Array:
    is_bfloat16 = tensor.kind == _BFLOAT and tensor.bits == 16
    letter = "u" if is_bfloat16 else LETTERS.get(tensor.kind)
    size, lost = divmod(tensor.bits, 8)
    if letter is None or lost or tensor.lanes != 1:
        reason = f"kind {tensor.kind} of {tensor.bits} bits is no dtype of NumPy"
        _refuse_tensor(name, value, f"{name}.astype('float32')", reason)
    shape = tuple(tensor.shape[: tensor.ndim])
    address = (tensor.data or 0) + tensor.byte_offset
    if math.prod(shape) and address < LOW:
        _refuse(name, f"{_kind(value)} without memory", "one whose values are stored")
    memory.__array_interface__ = {
        "version": 3,
        "data": (address, not writable),
        "shape": shape,
        "strides": tuple(size * step for step in tensor.strides[: tensor.ndim]) if tensor.strides else None,
        "typestr": f"{'<' if sys.byteorder == 'little' else '>'}{letter}{size}",
    }
    array = np.asarray(memory)
    return array.view(bfloat16(name)) if is_bfloat16 else array


# Messages ------------------------------------------------------------------------------------------------------------


def _refuse_tensor(name: str, value: object, way: str, reason: object) -> NoReturn:
    line = str(reason).strip().partition("\n")[0]
    _refuse(name, _kind(value), f"a NumPy array, or a dense tensor in the CPU's memory, such as {way} ({line})")


def _refuse(name: str, given: str, allowed: str) -> NoReturn:
    raise TypeError(f"{name}: got {given}; allowed: {allowed}")


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
