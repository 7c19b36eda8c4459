"""What was measured? Rows of the table, the machine on which they were measured, and both as lines of JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn._backends import select

from .problem import Variant
from .shapes import Shape

Key = tuple[str, str, Variant, Shape, int]

FASTBN, PEER, COPY, BASE = "fastbn", "peer", "copy", "base"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant's time for one pass.

    Attributes
    ----------
    seconds, spread, samples : the median, the interquartile range over the median, and the number of samples
    to_copy : the time over that of a copy of x by as many threads
    gb_per_s : the bytes that the pass must at least move, over the time
    over : in fastbn's rows, each peer's time over this row's time
    against : in fastbn's rows, this time over that of each base of the variant: float32, unfused, dense
    difference : the largest difference from the result of fastbn's first row, relative to its largest value
    """

    pass_: str
    layout: str
    dtype: str
    shape: Shape
    threads: int
    contestant: str
    kind: str
    seconds: float
    spread: float
    samples: int
    to_copy: float
    gb_per_s: float
    bytes_moved: int
    agrees: bool = True
    difference: float = 0.0
    over: Mapping[str, float] = field(default_factory=dict)
    activation: str = "none"
    strides: str = "dense"
    against: Mapping[str, float] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        """The dtype, the activation and the strides."""
        return Variant(self.dtype, self.activation, self.strides)

    @property
    def key(self) -> Key:
        """The pass, layout, variant, shape and threads, which all contestants of a race share."""
        return (self.pass_, self.layout, self.variant, self.shape, self.threads)


@dataclass(frozen=True)
class Run:
    """Rows, the machine on which they were measured, and notes about them."""

    machine: dict[str, str]
    rows: list[Row]
    notes: list[str]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} processors" if names else platform.processor() or platform.machine()


def describe_machine(backends: Iterable[str], versions: Mapping[str, str], command: str) -> dict[str, str]:
    """The processor, the versions, what the backends say about themselves, and the command."""
    described = {"processor": _processor(), "system": platform.platform(), "fastbn": fastbn.__version__}
    for backend in backends:
        details = ", ".join(f"{key} {value}" for key, value in select(backend).describe().items())
        described[f"fastbn {backend}"] = details
    return described | {"NumPy": np.__version__, **versions, "command": command}


def save(run: Run, path: Path) -> None:
    """Writes a line for the machine, a line for the notes, and a line for each row."""
    lines: list[dict[str, Any]] = [{"kind": "machine", **run.machine}, {"kind": "notes", "notes": run.notes}]
    lines += [asdict(row) for row in run.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def load(path: Path) -> Run:
    """Reads a file that `save` has written."""
    run = Run({}, [], [])
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if fields["kind"] == "machine":
            run.machine.update({key: value for key, value in fields.items() if key != "kind"})
        elif fields["kind"] == "notes":
            run.notes.extend(fields["notes"])
        else:
            run.rows.append(Row(**(fields | {"shape": tuple(fields["shape"])})))
    return run


def races(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The rows of each race, in the order in which they were run."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found
