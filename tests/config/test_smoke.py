"""Does `fastbn.test()` say what it finds, and does it find what is wrong?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn
from fastbn import _smoke, cli
from fastbn._backends import select


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the backends that compile, and on small arrays for the check of threads."""
    usable = tuple(name for name in fastbn.backends() if name != "numba")
    monkeypatch.setattr(_smoke, "backends", lambda: usable)
    monkeypatch.setattr(_smoke, "LARGE", (((8, 12, 9, 9), 1), ((8, 9, 9, 12), -1)))


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    first, *rest, last = capsys.readouterr().out.splitlines()
    found = {name.strip(): told for name, told in (re.split(r"  +", line.strip(), maxsplit=1) for line in rest)}
    return {"first": first, **found, "last": last}


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert fastbn.test() is True
    told = lines_of(capsys)
    assert told["first"].startswith(f"fastbn {fastbn.__version__} on ")
    assert re.fullmatch(rf"all {len(told) - 2} checks passed in \d+\.\d s", told["last"])
    for name in fastbn.backends():
        assert "of what is promised" in told[f"{name}: accuracy"]
        assert told[f"{name}: threads"].startswith(("the same bits for 1, 2, 3", "only one"))
    if "c" in fastbn.backends():
        assert all(name in told["c: instruction sets"] for name in cases.isas())


@pytest.mark.parametrize("verb", ["forward", "backward"])
def test_a_backend_that_is_wrong(
    verb: str, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a few units in the last place, in one channel: only its own line says so."""
    numpy_backend: Any = select("numpy")
    right = getattr(numpy_backend, verb)

    def wrong(call: Any) -> None:
        right(call)
        result = call.y if verb == "forward" else call.dx
        result[:, 1] *= 1 + 2.0**-20

    monkeypatch.setattr(numpy_backend, verb, wrong)
    assert fastbn.test() is False
    told = lines_of(capsys)
    failed = {name for name, text in told.items() if text.startswith("FAILED: ")}
    assert failed == {"numpy: accuracy"}
    assert re.search(
        r"(y|dx) of float32, channels-first, is off by \S+ times what is promised", told["numpy: accuracy"]
    )
    assert told["last"].startswith("1 of ")


def test_threads_that_matter(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numpy_backend: Any = select("numpy")
    right = numpy_backend.infer

    def wrong(call: Any) -> None:
        right(call)
        call.y[0] += call.threads == 3

    monkeypatch.setattr(numpy_backend, "infer", wrong)
    assert fastbn.test() is False
    assert lines_of(capsys)["numpy: threads"] == (
        "FAILED: ArithmeticError: the bits depend on the number of threads, among 1, 2, 3"
    )


@pytest.mark.skipif(len(cases.isas()) < 3, reason="needs two instruction sets besides the baseline")
def test_instruction_sets_that_differ(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the one that was in use is in use again."""
    bridge: Any = select("c")
    before, right = bridge.isa(), _smoke.infer

    def wrong(*arguments: Any, **options: Any) -> Any:
        y = right(*arguments, **options)
        return np.nextafter(y, y.dtype.type(9)) if bridge.isa() == "avx2" else y

    monkeypatch.setattr(_smoke, "infer", wrong)
    assert fastbn.test() is False
    told = lines_of(capsys)
    assert told["c: instruction sets"] == "FAILED: ArithmeticError: avx512 and avx2 give other bits"
    assert bridge.isa() == before


def test_where_long_double_is_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and on Apple's processors: the formulas are then still exact enough to compare with."""
    monkeypatch.setattr(np, "longdouble", np.float64)
    for name in fastbn.backends():
        if name != "numba":
            assert "float64: errors are at most 0." in _smoke._on(name, lambda: _smoke._accuracy(("float64",)))


def test_an_error_is_one_line(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: Any) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(_smoke, "moments", broken)
    assert fastbn.test() is False
    assert lines_of(capsys)["parts of a batch"] == "FAILED: OSError: no such thing"


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for well in (True, False):
        monkeypatch.setattr(fastbn, "test", lambda well=well: well)
        assert cli.main(["test"]) == int(not well)


def test_with_numpy_alone(tmp_path: Path) -> None:
    """It asks for no other package, and leaves the process as it was."""
    others = ("numba", "ml_dtypes", "torch", "onnx", "pytest", "scipy")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        "import fastbn; before = fastbn.get_backend(), fastbn.get_num_threads()\n"
        "assert fastbn.test()\n"
        "assert before == (fastbn.get_backend(), fastbn.get_num_threads())"
    )
    done = cases.run_python(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float16, float32, float64: errors" in done.stdout
