"""What must a pass pay for memory on this machine? Compiles limit.c for it, and enters its loops in the race.

Inference reads x and writes y; the forward pass reads x, and then does what inference does; the backward pass reads x
and dy, and then reads them again and writes dx. The limit is the time of the plainest loops that do so, one after the
other, each in the way that is fastest here: it asks for what comes or not, and writes around the cache or not. A pass
whose second reading finds a part in a cache can beat it.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from .problem import Contestant, Problem
from .timing import Samples

LEAST_BYTES = 1 << 20
"""The limit of smaller arrays is not measured: calling the loops would take longer than the loops."""

AHEAD, LINE, STEP = 2048, 64, 256

LOOPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "infer": (("map", "map around"),),
    "forward": (("read", "read ahead"), ("map", "map around")),
    "backward": (("read2",), ("map2", "map2 around")),
}
"""What each pass does, one after the other, and the ways to do it."""


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        raise ImportError(f"there is no C compiler {' '.join(command) or 'in CC'} (CC names another)")
    return command


@cache
def _library() -> ctypes.CDLL:
    """The loops, compiled for this machine. Raises ImportError where they cannot be."""
    source, command = Path(__file__).with_name("limit.c"), _compiler()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = str(Path(folder, "limit.so"))
        for flags in (["-O3", "-march=native"], ["-O3"]):
            done = subprocess.run(
                [*command, *flags, "-shared", "-fPIC", str(source), "-o", target], capture_output=True, text=True
            )
            if done.returncode == 0:
                return ctypes.CDLL(target)
    raise ImportError(
        f"{' '.join(command)} cannot compile it: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
    )


def missing() -> str:
    """Why there is no limit on this machine; empty if there is one."""
    try:
        _library()
    except (ImportError, OSError) as error:
        return f'no column "limit": {error}'
    return ""


def contestants(problem: Problem, pass_: str, threads: int) -> list[Contestant]:
    """The loops of a pass, by the names in LOOPS; none for several threads, small arrays and those with gaps."""
    if threads > 1 or problem.strides != "dense" or problem.x.nbytes < LEAST_BYTES or missing():
        return []
    library, y = _library(), problem.out.ctypes.data
    shift = -y % LINE
    words = ctypes.c_size_t((problem.x.nbytes - shift) // STEP * STEP // 8)
    x, dy, out = (ctypes.c_void_p(array.ctypes.data + shift) for array in (problem.x, problem.dy, problem.out))
    no, ahead = ctypes.c_size_t(0), ctypes.c_size_t(AHEAD)
    calls = {
        "read": partial(library.limit_read, x, words, no),
        "read ahead": partial(library.limit_read, x, words, ahead),
        "map": partial(library.limit_map, out, x, words, 0),
        "map around": partial(library.limit_map, out, x, words, 1),
        "read2": partial(library.limit_read2, x, dy, words),
        "map2": partial(library.limit_map2, out, x, dy, words, 0),
        "map2 around": partial(library.limit_map2, out, x, dy, words, 1),
    }
    names = [name for ways in LOOPS[pass_] for name in ways]
    return [Contestant(name=name, call=calls[name], results=lambda _: ()) for name in names]


def fastest(pass_: str, taken: Mapping[str, Samples]) -> Sequence[Samples]:
    """The samples of the fastest way of each thing that the pass does."""
    return [min((taken[name] for name in ways), key=lambda samples: samples.median) for ways in LOOPS[pass_]]
