"""Are habits measured, kept for this machine alone, read if whole, and told, and is only a clear gain taken?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest

import fastbn
from fastbn import _tune, cli
from fastbn.config import environment, habits

bridge: Any = pytest.importorskip("fastbn._backends.c.bridge", reason="the C backend is not built")

SOME = {"streams": 4, "row_streams": 2, "turn": 1024, "ahead": -1, "stream_from": 1 << 20, "block": 1 << 18}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of measurements, which does not exist; what is in force is put back."""
    before = bridge.habits()
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTBN_TUNING", raising=False)
    monkeypatch.setattr(habits, "_measured", None)
    environment.environment_tuning.cache_clear()
    bridge.set_habits(bridge.usual_habits())
    yield tmp_path / "cache" / "habits"
    bridge.set_habits(before)
    environment.environment_tuning.cache_clear()


def keep(values: dict[str, int] = SOME) -> Path:
    return habits.keep(habits.record_of(bridge, values, 2))


def in_a_process(where: Path, **settings: str) -> str:
    """What a process tells of its habits after its first call."""
    script = "import fastbn; from fastbn.config import habits; from fastbn._backends import select; "
    done = cases.run_python(script + "print(habits.shown(select('c')))", where, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr


# Keeping and reading -------------------------------------------------------------------------------------------------


def test_what_is_kept_is_read(folder: Path) -> None:
    path = keep()
    assert os.listdir(folder) == [path.name]
    assert bridge.habits() == bridge.usual_habits()
    habits.load(bridge)
    assert bridge.habits() == SOME
    told = habits.shown(bridge)
    assert "streams 4, row_streams 2, turn 1024, ahead -1" in told
    assert "measured here on 20" in told
    assert "with 2 threads" in told


def test_nothing_is_made_where_nothing_was_measured(folder: Path) -> None:
    habits.load(bridge)
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    habits.load(bridge)
    assert bridge.habits() == bridge.usual_habits()


def test_a_new_process_reads_it_unless_it_is_off(tmp_path: Path) -> None:
    usual = in_a_process(tmp_path)
    assert "measured" not in usual
    keep()
    assert "streams 4, row_streams 2, turn 1024" in in_a_process(tmp_path)
    assert "measured here on 20" in in_a_process(tmp_path, FASTBN_TUNING="on")
    off = in_a_process(tmp_path, FASTBN_TUNING="off")
    assert off == usual.replace(")", "; FASTBN_TUNING=off)")


@pytest.mark.parametrize("changed", ["fastbn", "processor", "isa", "caches"])
def test_measurements_are_of_one_machine_and_version(
    changed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one reads nothing, keeps a file of its own, and does not warn."""
    mine, usual = keep(), bridge.usual_habits()
    machine = habits._machine(bridge)
    other = {**machine, changed: [1, 2, 3] if changed == "caches" else "another"}
    monkeypatch.setattr(habits, "_machine", lambda _: other)
    habits.load(bridge)
    assert bridge.habits() == usual
    theirs = keep({**SOME, "turn": 512})
    assert theirs != mine
    habits.load(bridge)
    assert bridge.habits()["turn"] == 512
    monkeypatch.setattr(habits, "_machine", lambda _: machine)
    habits.load(bridge)
    assert bridge.habits() == SOME


def test_the_machine_is_named() -> None:
    machine = habits._machine(bridge)
    assert machine["fastbn"] == fastbn.__version__
    assert machine["isa"] == bridge.isa()
    assert machine["processor"]
    assert len(machine["caches"]) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 106\nmodel name\t: Xeon: 8375C\n"
            "stepping\t: 6\ncpu MHz\t\t: 2899.9\n\nprocessor\t: 1\nmodel\t\t: 7\n",
            "vendor_id GenuineIntel, cpu family 6, model 106, model name Xeon: 8375C, stepping 6",
        ),
        (
            "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\n"
            "CPU part\t: 0xd0c\nCPU revision\t: 1\n\n",
            "CPU implementer 0x41, CPU variant 0x3, CPU part 0xd0c, CPU revision 1",
        ),
        ("processor\t: 0\ncpu\t\t: POWER9, altivec supported\nclock\t\t: 2.1\n", "cpu POWER9, altivec supported"),
    ],
    ids=["x86", "ARM", "POWER"],
)
def test_names_of_processors(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert habits.processor(str(tmp_path / "cpuinfo")) == told


def test_a_processor_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", "AMD64 Family 25")
    assert habits.processor(str(tmp_path / "none")) == "AMD64 Family 25"
    monkeypatch.delenv("PROCESSOR_IDENTIFIER")
    assert habits.processor(str(tmp_path / "none"))


def changed(**fields: Any) -> Any:
    return lambda text: json.dumps({**json.loads(text), **fields}).encode()


def habit(**values: Any) -> Any:
    return changed(habits={**SOME, **values})


DAMAGES = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "not text": lambda text: bytes(range(256)),
    "not an object": lambda text: b"[1, 2]",
    "nested": lambda text: b"[" * 60_000,
    "long": lambda text: b" " * (1 << 16) + text,
    "a long number": lambda text: text.replace(b"1024", b"9" * 5000),
    "another machine's": changed(machine={"isa": "neon"}),
    "another field": changed(more=1),
    "no date": changed(date=7),
    "no threads": changed(threads=0),
    "no habits": changed(habits=None),
    "a habit missing": changed(habits={"streams": 1}),
    "a habit that is true": habit(streams=True),
    "a habit that is a fraction": habit(streams=1.0),
    "a habit that is text": habit(turn="512"),
    "streams": habit(streams=9),
    "turn": habit(turn=-1),
    "ahead": habit(ahead=-2),
    "stream_from": habit(stream_from=1 << 62),
    "block": habit(block=1 << 62),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_ignored_with_a_warning(damage: str) -> None:
    path = keep()
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="damaged file is ignored") as caught:
        habits.load(bridge)
    (warning,) = caught
    assert str(path) in str(warning.message)
    assert "fastbn tune" in str(warning.message)
    assert bridge.habits() == bridge.usual_habits()
    keep()
    with warnings.catch_warnings(action="error"):
        habits.load(bridge)
    assert bridge.habits() == SOME


def test_a_folder_in_the_files_place() -> None:
    path = keep()
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="damaged file is ignored"):
        habits.load(bridge)
    assert bridge.habits() == bridge.usual_habits()


def test_calls_go_on_where_the_file_is_damaged(tmp_path: Path) -> None:
    keep().write_bytes(b"{")
    script = "import numpy as np, fastbn; print(fastbn.forward(np.ones((3, 2))).y.sum())"
    done = cases.run_python(script, tmp_path)
    assert (done.returncode, done.stdout) == (0, "0.0\n")
    assert done.stderr.count("RuntimeWarning: damaged file is ignored") == 1


def test_a_file_is_replaced_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If that fails, the old one is there, and nothing else."""
    path = keep()
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        keep({**SOME, "streams": 1})
    assert os.listdir(folder) == [path.name]
    assert path.read_bytes() == before


# Folders that cannot be written --------------------------------------------------------------------------------------


def assert_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(_tune, "_stages", None)  # would be called
    with pytest.raises(OSError, match="FASTBN_CACHE_DIR"):
        fastbn.tune(quick=True)
    assert cli.main(["tune", "--quick"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def test_a_file_in_the_folders_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.parent.write_text("")
    habits.load(bridge)
    assert str(folder) in assert_nothing_is_measured(monkeypatch, capsys)


def test_a_folder_that_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "Permission denied" in assert_nothing_is_measured(monkeypatch, capsys)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not stop this user")
def test_a_read_only_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in it is read."""
    keep()
    folder.chmod(0o555)
    try:
        assert str(folder) in assert_nothing_is_measured(monkeypatch, capsys)
        habits.load(bridge)
        assert bridge.habits() == SOME
    finally:
        folder.chmod(0o755)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(habits, "cache_dir", lambda: None)
    habits.load(bridge)
    assert "home" in assert_nothing_is_measured(monkeypatch, capsys)


# The whole way -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.Popen[str]:
    given = [sys.executable, "-P", "-m", "fastbn", *arguments]
    one_thread = {**os.environ, "FASTBN_NUM_THREADS": "1"}  # two processes with several each would wait for each other
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread)


def test_two_processes_at_once(folder: Path, tmp_path: Path) -> None:
    """Each measures, prints its tables and keeps; one file is left, which is whole."""
    both = [command("tune", "--quick") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        for name in habits.PLAUSIBLE:
            assert f"\n  {name} " in out
        assert "no bit of a result depends on them" in out
        assert f"Kept in {folder}" in out
    assert len(os.listdir(folder)) == 1
    assert "measured here on 20" in in_a_process(tmp_path)
    info, _ = command("info").communicate(timeout=60)
    assert "c: habits" in info
    assert "measured here on 20" in info


def test_this_process_uses_what_it_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fastbn.use_num_threads(1):
        found = fastbn.tune(quick=True, keep=False)
    assert found == bridge.habits()
    assert not folder.exists()
    assert "Kept" not in capsys.readouterr().out
    fastbn.show_config()
    assert "with 1 thread)" in capsys.readouterr().out


def test_off_measures_and_keeps_but_does_not_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTBN_TUNING", "off")
    monkeypatch.setattr(_tune, "_best", lambda *_: _tune.Found("turn", 512, 1000, 0.5))
    monkeypatch.setattr(_tune, "_seconds", lambda call: 1.0 if bridge.habits()["turn"] == 1000 else 2.0)
    assert fastbn.tune(quick=True)["turn"] == 1000
    assert bridge.habits() == bridge.usual_habits()
    told = capsys.readouterr().out
    assert "FASTBN_TUNING=off: this process does not use" in told
    assert "All of them:" in told


def test_what_gains_nothing_on_the_whole_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_tune, "_best", lambda *_: _tune.Found("turn", 512, 1000, 0.5))
    monkeypatch.setattr(_tune, "_seconds", lambda call: 2.0 if bridge.habits()["turn"] == 1000 else 1.9)
    assert fastbn.tune(quick=True) == bridge.usual_habits()
    told = capsys.readouterr().out
    assert "All of them:" in told
    assert "1.05" in told
    assert "the default remains" in told
    habits.load(bridge)
    assert bridge.habits() == bridge.usual_habits()


def test_what_is_interrupted_leaves_the_habits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.set_habits(SOME)
    taken = []

    def interrupt(call: Any) -> float:
        taken.append(bridge.habits())
        if len(taken) == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(_tune, "_seconds", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastbn.tune(quick=True)
    assert bridge.habits() == SOME
    assert len({tuple(habit.values()) for habit in taken}) > 1
    assert os.listdir(folder) == []


def test_habits_of_the_program_are_told() -> None:
    bridge.set_habits(SOME)
    assert "(set by this program)" in habits.shown(bridge)
    bridge.set_habits(dict.fromkeys(SOME, 0))
    assert "streams default, row_streams default" in habits.shown(bridge)


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress(
    rich: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar on a terminal, if rich is installed, and nothing elsewhere."""
    if rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("FORCE_COLOR", "1")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setattr(_tune, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with _tune._progress(2) as show:
        show("row_streams", 0.5)
    assert ("row_streams" in capsys.readouterr().out) == (rich and terminal)


# What is taken -------------------------------------------------------------------------------------------------------

WANTED = _tune.Stage("streams", (1, 2, 4, 8), [_tune.Pass("one", lambda: None), _tune.Pass("other", lambda: None)])


def best(monkeypatch: pytest.MonkeyPatch, *rounds: dict[int, tuple[float, float]]) -> _tune.Found:
    """What is found where the passes take these times for each number of streams, in the first race and the second."""
    races, calls = list(rounds), [0]
    measure = _tune._ratios

    def ratios(bridge: Any, candidates: Any, *rest: Any) -> Any:
        own = races.pop(0)
        calls[0] = 0

        def seconds(call: Any) -> float:
            first = call is WANTED.passes[0].call
            drift = 1 + calls[0] // (2 * len(candidates))  # each round is slower than the last
            calls[0] += 1
            return own.get(bridge.habits()["streams"], (1.0, 1.0))[0 if first else 1] * drift

        monkeypatch.setattr(_tune, "_seconds", seconds)
        return measure(bridge, candidates, *rest)

    monkeypatch.setattr(_tune, "_ratios", ratios)
    return _tune._best(bridge, {**SOME, "streams": 8}, WANTED, 0.01, lambda part: None)


@pytest.mark.parametrize(
    ("first", "again", "taken", "over"),
    [
        ({2: (0.8, 0.9), 4: (0.85, 0.9)}, {2: (0.81, 1.0)}, 2, 0.9),
        ({2: (0.8, 0.9)}, {2: (0.99, 0.99)}, 8, 1.0),
        ({2: (0.98, 0.98)}, {}, 8, 1.0),
        ({2: (0.5, 1.2)}, {}, 8, 1.0),
        ({2: (0.5, 1.2), 1: (0.9, 0.9)}, {1: (0.9, 0.9)}, 1, 0.9),
        ({1: (2.0, 2.0)}, {}, 8, 1.0),
    ],
    ids=["gains", "gained by chance", "hardly gains", "loses elsewhere", "second best", "the default is best"],
)
def test_only_a_clear_gain_is_taken(
    first: Any, again: Any, taken: int, over: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = best(monkeypatch, first, again)
    assert found == ("streams", 8, taken, pytest.approx(over))


def test_all_that_may_be_found_is_plausible() -> None:
    """For any caches that the C core may tell; 0 is unknown."""
    for caches, threads in (((0, 0, 0), 1), ((1 << 20, 64 << 20, 0), 2), ((32 << 10, 1 << 20, 32 << 20), 64)):
        stages, passes = _tune._stages(caches, threads, quick=True)
        assert {stage.habit for stage in stages} == set(habits.PLAUSIBLE)
        assert len({timed.name for timed in passes}) == len(passes)
        for stage in stages:
            least, most = habits.PLAUSIBLE[stage.habit]
            assert stage.passes
            assert all(least <= candidate <= most for candidate in stage.candidates)
