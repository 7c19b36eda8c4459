"""Does `fastbn bench --ranks` time norms on several ranks, with each transport that is installed?"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import rank_cases

pytest.importorskip("rich", reason='needs pip install "fastbn[bench]"')
cli, options, ranks, shapes = (
    pytest.importorskip(f"fastbn.bench.{name}") for name in ("cli", "options", "ranks", "shapes")
)


def row(shape: tuple[int, ...], seconds: float, number: int = 1) -> Any:
    return ranks.Row("MPI", number, shape, seconds, seconds / 4, seconds / 8, 1000)


def test_a_step_has_53_norms() -> None:
    assert sum(ranks.IN_A_STEP.values()) == 53
    rows = [row((32, *shape), 1.0) for shape in shapes.RESNET50]
    whole = ranks.whole_steps([*rows, row((8, 64), 1.0, 2)])
    assert whole == [ranks.Row("MPI", 1, (), 53.0, 53 / 4, 53 / 8, 53000)]
    assert ranks.whole_steps(rows[1:]) == []


@pytest.mark.parametrize("transport", ["MPI", "gloo"])
def test_a_run(
    transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport == "MPI":
        command, environment = rank_cases.mpiexec()
        monkeypatch.setenv("PATH", str(Path(command[0]).parent), prepend=os.pathsep)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    else:
        pytest.importorskip("torch")
        pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(ranks, "TRANSPORTS", {transport: ranks.TRANSPORTS[transport]})
    arguments = ["--ranks", "1,2", "--quick", "--seconds", "0.02", "--shapes", "5x64", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "does not run" not in printed, printed
    assert "5x64" in printed
    (saved,) = tmp_path.glob("*/ranks.jsonl")
    alone, together = (json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines())
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    assert 0 < together["communication"] + together["waiting"] <= together["seconds"] * 1.5
    header = importlib.import_module("fastbn._ranks").HEADER.itemsize
    message = 2 * (8 + header + 8) + 8 * 64 * (3 + 2)  # and its size
    assert together["sent"] == {"MPI": message, "gloo": 2 << 14}[transport]
    assert alone["sent"] == {"MPI": message, "gloo": 0}[transport]


def test_what_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TRANSPORTS", {"MPI": "no_such_package"})
    rows, notes = ranks.measure([1], [(5, 64)], options.QUICK_BUDGET)
    assert rows == []
    assert notes == ["MPI does not run: No module named 'no_such_package'"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--ranks", "0"])
    assert "--ranks: got '0'; allowed: all, or positive integers" in capsys.readouterr().err
