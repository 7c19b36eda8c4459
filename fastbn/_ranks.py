"""What do ranks tell each other? Each one its moments, its sums or its error, in one message; all merge in rank order.

Every rank gets all messages and adds them up in the same order, so all have the same bits. An error that one rank
raises before it has sent its message becomes its message, and every rank raises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from ._moments import Moments, Sums
from .call.dtypes import FLOAT64, DType

Array = np.ndarray[Any, Any]
Part = TypeVar("Part", Moments, Sums)

Gather = Callable[[Array], list[Array]]
"""Sends a message, an array of bytes, to all ranks, and returns theirs by rank. Bytes beyond a message are ignored."""

MOST_AGREED = 4

HEADER = np.dtype(
    [
        ("call", "S16"),
        ("error", np.int64),
        ("channels", np.int64),
        ("statistics", np.int64),
        ("bytes", np.int64),
        ("agreed", np.float64, (MOST_AGREED,)),
    ]
)
"""The name of the call; 0, or the number of an error's class; the number of channels; the item size of the statistics
dtype; the number of bytes after the header, which are float64 values or the error's text; and what must be the same on
all ranks."""

_ERRORS: tuple[type[Exception], ...] = (TypeError, ValueError, NotImplementedError, RuntimeError)
"""The classes that an error keeps on other ranks; any other becomes a RuntimeError there."""


class Exchange:
    """One exchange of messages, which a `with` block must reach: if it raises before, the other ranks get the error.

    Parameters
    ----------
    gather : Gather
    call : str
        Its name, up to 16 letters. All ranks must make the same call.
    data : str
        What errors call the data.
    most : int or None
        The number of bytes that a message may have, where an error's text must be cut to it.
    """

    def __init__(self, gather: Gather, call: str, data: str = "x", most: int | None = None) -> None:
        self._gather, self._call, self._data, self._most = gather, call, data, most
        self._sent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, Exception) and not self._sent:
            code, text = _described(error)
            room = None if self._most is None else self._most - HEADER.itemsize
            try:
                self._send(np.frombuffer(text.encode()[:room], np.uint8), error=code)
            except Exception as failed:
                error.add_note(f"The other ranks could not be told of it: {failed}")

    def total(self, part: Part, agreed: Mapping[str, float]) -> Part:
        """The sum of all ranks' parts, in the order of the ranks.

        Raises the error of the first rank that has one, and ValueError, TypeError or RuntimeError, on all ranks alike,
        unless the parts fit together and the values in `agreed` are the same everywhere.
        """
        buffers = self._values(part.to_buffer(), part.channels, part.dtype, agreed)
        parts = [type(part).from_buffer(buffer, part.dtype) for buffer in buffers]
        return reduce(operator.add, parts)

    def summed(self, values: Array, agreed: Mapping[str, float]) -> Array:
        """The sum of all ranks' arrays of float64, whose last axis is the channels, in the order of the ranks."""
        with np.errstate(all="ignore"):
            total: Array = reduce(operator.add, self._values(values.reshape(-1), values.shape[-1], FLOAT64, agreed))
        return total.reshape(values.shape)

    def _values(self, values: Array, channels: int, statistics: DType, agreed: Mapping[str, float]) -> list[Array]:
        given = [*agreed.values(), *[0.0] * (MOST_AGREED - len(agreed))]
        payload = np.ascontiguousarray(values).view(np.uint8)
        messages = self._send(payload, channels=channels, statistics=statistics.itemsize, agreed=given)
        headers = [message[: HEADER.itemsize].view(HEADER)[0] for message in messages]
        payloads = [
            message[HEADER.itemsize :][: int(header["bytes"])]
            for message, header in zip(messages, headers, strict=True)
        ]
        _raise_errors(headers, payloads)
        self._check_agreed(headers, list(agreed))
        return [payload.view(FLOAT64) for payload in payloads]

    def _check_agreed(self, headers: list[Any], names: list[str]) -> None:
        """Raises, on every rank the same, if ranks differ in what they do or in what must be the same."""
        _check_same(RuntimeError, "call", [header["call"].decode() for header in headers])
        _check_same(ValueError, self._data, [f"{header['channels']} channels" for header in headers])
        statistics = [f"the statistics dtype float{8 * header['statistics']}" for header in headers]
        _check_same(TypeError, self._data, statistics)
        for i, name in enumerate(names):
            _check_same(ValueError, name, [repr(float(header["agreed"][i])).removesuffix(".0") for header in headers])

    def _send(self, payload: Array, **fields: Any) -> list[Array]:
        header = np.zeros(1, HEADER)
        for name, value in {"call": self._call.encode(), "bytes": payload.size, **fields}.items():
            header[name] = value
        self._sent = True
        return self._gather(np.concatenate((header.view(np.uint8), payload)))


def _described(error: Exception) -> tuple[int, str]:
    """The number of an error's class, from 1, and its text."""
    for number, kind in enumerate(_ERRORS, 1):
        if isinstance(error, kind):
            return number, str(error)
    return len(_ERRORS), f"{type(error).__name__}: {error}"


def _raise_errors(headers: list[Any], payloads: list[Array]) -> None:
    for rank, (header, payload) in enumerate(zip(headers, payloads, strict=True)):
        if header["error"]:
            text = payload.tobytes().decode(errors="replace")
            raise _ERRORS[int(header["error"]) - 1](f"on rank {rank}: {text}")


def _check_same(error: type[Exception], name: str, found: list[str]) -> None:
    for rank, value in enumerate(found):
        if value != found[0]:
            raise error(f"{name}: got {found[0]} on rank 0 and {value} on rank {rank}; allowed: the same on every rank")
