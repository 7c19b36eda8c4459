"""What was measured? Rows of the table, the machine on which they were measured, and both as lines of JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn._backends import select

from .problem import Variant
from .shapes import Shape

Key = tuple[str, str, Variant, Shape, int]

FASTBN, PEER, COPY, LIMIT, BASE = "fastbn", "peer", "copy", "limit", "base"

SCHEMA = 1
"""The version of the rows' fields: those of `Row`. A field may be added; else the number goes up."""

NOISY = 1 / 3
"""A row whose spread is larger is marked, and compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant's time for one pass. The fields are those of the JSON; `fastbn.bench.run` explains them."""

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
    gb_per_s: float
    bytes_moved: int
    others: Mapping[str, float]
    agrees: bool = True
    difference: float = 0.0
    activation: str = "none"
    strides: str = "dense"
    result: str = "out"
    mask: bool = False
    residual: bool = False

    @property
    def noisy(self) -> bool:
        """Whether the samples are too far apart for a comparison."""
        return self.spread > NOISY

    @property
    def to_copy(self) -> float:
        """The time over that of a copy of x by as many threads."""
        return 1 / self.others[COPY]

    @property
    def over_limit(self) -> float | None:
        """The time over that of the plainest loops that move the same bytes, if these were timed."""
        return 1 / self.others[LIMIT] if LIMIT in self.others else None

    @property
    def over(self) -> dict[str, float]:
        """Each peer's time over this one."""
        return {name: ratio for name, ratio in self.others.items() if name not in (COPY, LIMIT, *self.variant.bases())}

    @property
    def against(self) -> dict[str, float]:
        """The time over that of each base of the variant: float32, unfused, ..."""
        return {base: 1 / self.others[base] for base in self.variant.bases() if base in self.others}

    @property
    def variant(self) -> Variant:
        """What the arrays are like, and what is asked of a call."""
        return Variant(self.dtype, self.activation, self.strides, self.result, self.mask, self.residual)

    @property
    def key(self) -> Key:
        """The pass, layout, variant, shape and threads, which all contestants of a race share."""
        return (self.pass_, self.layout, self.variant, self.shape, self.threads)

    def as_json(self) -> dict[str, Any]:
        """The fields and whether it is noisy, as JSON has them: `pass_` is `pass`, tuples are lists."""
        fields = asdict(self) | {"shape": list(self.shape), "others": dict(self.others), "noisy": self.noisy}
        return {name.rstrip("_"): value for name, value in fields.items()}


def from_json(fields: Mapping[str, Any]) -> Row:
    """The row of which `as_json` made these fields."""
    given = {"pass_" if name == "pass" else name: value for name, value in fields.items() if name != "noisy"}
    return Row(**(given | {"shape": tuple(fields["shape"])}))


@dataclass(frozen=True)
class Run:
    """Rows, the machine on which they were measured, and notes about them."""

    machine: dict[str, str]
    rows: list[Row]
    notes: list[str]


def processor() -> str:
    """The processor's name, with its family and model where the name does not tell, and how many there are."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = [line.partition(":") for line in text.splitlines()]
    values = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    count = sum(key.strip() == "processor" for key, *_ in lines) or os.cpu_count()
    if "model name" not in values:
        return f"{platform.processor() or platform.machine()}, {count} processors"
    details = [f"{word} {values[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in values]
    return ", ".join(
        [f"{values['model name']} ({', '.join(details)})" if details else values["model name"], f"{count} processors"]
    )


def describe_machine(backends: Iterable[str], versions: Mapping[str, str], command: str) -> dict[str, str]:
    """The processor, the date, the versions, what the backends say about themselves, and the command."""
    system = " ".join(word for word in (platform.system(), platform.machine(), *platform.libc_ver()) if word)
    described = {"processor": processor(), "system": system, "date": time.strftime("%Y-%m-%d")}
    described["fastbn"] = fastbn.__version__
    for backend in backends:
        details = ", ".join(f"{key} {value}" for key, value in select(backend).describe().items())
        described[f"fastbn {backend}"] = details
    return described | {"NumPy": np.__version__, **versions, "command": command}


def save(run: Run, path: Path) -> None:
    """Writes a line for the machine, a line for the notes, and a line for each row."""
    lines: list[dict[str, Any]] = [
        {"kind": "machine", "schema": SCHEMA, **run.machine},
        {"kind": "notes", "notes": run.notes},
    ]
    lines += [row.as_json() for row in run.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def load(path: Path) -> Run:
    """Reads a file that `save` has written; any other is a ValueError."""
    run = Run({}, [], [])
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            if fields["kind"] == "machine":
                schema = fields.get("schema")
                if schema != SCHEMA:
                    raise ValueError(f"got rows of schema {schema}; allowed: {SCHEMA}")
                run.machine.update({key: value for key, value in fields.items() if key not in ("kind", "schema")})
            elif fields["kind"] == "notes":
                run.notes.extend(fields["notes"])
            else:
                run.rows.append(from_json(fields))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has no rows of fastbn bench: {error}") from error
    return run


def races(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The rows of each race, in the order in which they were run."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found
