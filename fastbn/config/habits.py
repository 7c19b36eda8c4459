"""Which habits of this machine were measured? They are kept in the cache folder, read, put in force and shown.

`fbn_habits` in fastbn.h says what a habit is. There is a file for each processor, instruction set, size of caches and
version of fastbn, which is replaced as a whole, so that processes that read and write find a whole file or none.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

from . import built, environment
from .cache_dir import cache_dir

PLAUSIBLE = {
    "streams": (0, 8),
    "row_streams": (0, 8),
    "turn": (0, 1 << 20),
    "ahead": (-1, 1 << 20),
    "stream_from": (-1, 1 << 40),
    "block": (0, 1 << 30),
}
"""The least and the most that a kept habit may be. The C core takes any number; others are a sign of damage."""

_TOLD = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "CPU implementer",
    "CPU variant",
    "CPU part",
    "CPU revision",
    "cpu",
    "isa",
    "uarch",
)
"""What /proc/cpuinfo calls a processor: on x86, on ARM, on POWER and on RISC-V."""

_MOST_BYTES = 1 << 16
_measured: dict[str, Any] | None = None
"""The record that was last put in force, by `load` or `put`."""


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """What tells this machine's first processor from others."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            first = file.read(4096).partition("\n\n")[0]  # the system makes up the rest only if it is read
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER") or platform.machine()
    pairs = (line.partition(":") for line in first.splitlines())
    told = {name.strip(): value.strip() for name, _, value in pairs}
    return ", ".join(f"{name} {told[name]}" for name in _TOLD if name in told) or platform.machine()


def _machine(bridge: Any) -> dict[str, Any]:
    """What the measurements hold for."""
    version, caches = built.version_here(), list(bridge.caches())
    return {"fastbn": version, "processor": processor(), "isa": bridge.isa(), "caches": caches}


def _path(folder: Path, machine: dict[str, Any]) -> Path:
    import zlib

    return folder / f"{machine['isa']}-{zlib.crc32(repr(machine).encode()):08x}.json"


def _folder() -> Path | None:
    base = cache_dir()
    return None if base is None else base / "habits"


# ---- reading ----


def load(bridge: Any) -> None:
    """Puts what was measured here in force, unless FASTBN_TUNING says "off". A damaged file is a RuntimeWarning."""
    if environment.environment_tuning() == "off":
        return
    folder = _folder()
    if folder is None or not folder.is_dir():
        return
    machine = _machine(bridge)
    path = _path(folder, machine)
    try:
        record = _checked(_read(path), machine)
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        message = f"damaged file is ignored ({error}); `fastbn tune` replaces it: {path}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return
    put(bridge, record)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES)
    import json

    return json.loads(text)


def _checked(record: Any, machine: dict[str, Any]) -> dict[str, Any]:
    """The record, which is of this machine and plausible. Raises ValueError otherwise."""
    if not isinstance(record, dict) or record.keys() != {"machine", "date", "threads", "habits"}:
        raise ValueError("it has other fields")
    if record["machine"] != machine:
        raise ValueError("it is about another machine")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", str(record["date"])) or not _is_within(record["threads"], 1, 1024):
        raise ValueError("it does not say when it was measured, or on how many threads")
    habits = record["habits"]
    if not isinstance(habits, dict) or habits.keys() != PLAUSIBLE.keys():
        raise ValueError("it has other habits")
    for name, (least, most) in PLAUSIBLE.items():
        if not _is_within(habits[name], least, most):
            raise ValueError(f"{name} is not an integer from {least} to {most}")
    return record


def _is_within(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def put(bridge: Any, record: dict[str, Any]) -> None:
    """Calls that start from now on have the habits of this record."""
    global _measured
    bridge.set_habits(record["habits"])
    _measured = record


# ---- writing ----


def record_of(bridge: Any, habits: dict[str, int], threads: int) -> dict[str, Any]:
    """What is kept of habits that were measured now, on so many threads."""
    import datetime

    date = datetime.date.today().isoformat()
    return {"machine": _machine(bridge), "date": date, "threads": threads, "habits": habits}


def writable_folder() -> Path:
    """The folder of the measurements, which is made. Raises OSError if it cannot be written."""
    import tempfile

    folder = _folder()
    if folder is None:
        raise OSError("there is no home folder to keep measurements in: set FASTBN_CACHE_DIR to a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise OSError(f"{folder} cannot be written ({why}): set FASTBN_CACHE_DIR to another folder") from error
    return folder


def keep(record: dict[str, Any]) -> Path:
    """Replaces this machine's file as a whole, and returns its path. Raises OSError if it cannot be written."""
    import contextlib
    import json
    import tempfile

    folder = writable_folder()
    path = _path(folder, record["machine"])
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
        try:
            json.dump(record, file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    return path


# ---- showing ----


def shown(bridge: Any) -> str:
    """The habits in force, and why, for show_config()."""
    habits: dict[str, int] = bridge.habits()
    return f"{', '.join(f'{name} {written(value)}' for name, value in habits.items())} ({_why(bridge)})"


def written(habit: int) -> str:
    """A habit in words; the C core has a default for each, which stands behind 0."""
    return str(habit) if habit else "default"


def _why(bridge: Any) -> str:
    habits, usual = bridge.habits(), bridge.usual_habits()
    off = "; FASTBN_TUNING=off" if environment.environment_tuning() == "off" else ""
    if _measured is not None and habits == _measured["habits"]:
        threads = _measured["threads"]
        return f"measured here on {_measured['date']} with {threads} thread{'s' * (threads > 1)}"
    if habits != usual:
        return "set by this program"
    return f"{'the table of processors' if any(usual.values()) else 'the default of fastbn'}{off}"
