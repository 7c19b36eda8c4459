"""Do threads, instruction sets and the environment do what they say, and does show_config() tell of them?"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from test_checks import assert_refused

import fastbn
from fastbn.config import environment

ISAS = cases.isas()


# Threads -------------------------------------------------------------------------------------------------------------


def test_which_thread_count_goes_first(settings: None) -> None:
    fastbn.set_num_threads(5)
    assert fastbn.get_num_threads() == 5
    with fastbn.use_num_threads(3):
        assert fastbn.get_num_threads() == 3
        with fastbn.use_num_threads(np.int64(2)):
            assert fastbn.get_num_threads() == 2
        fastbn.set_num_threads(7)
        assert fastbn.get_num_threads() == 3
    assert fastbn.get_num_threads() == 7


def test_thread_block_ends_with_an_exception() -> None:
    before = fastbn.get_num_threads()
    with pytest.raises(KeyError), fastbn.use_num_threads(before + 1):
        raise KeyError
    assert fastbn.get_num_threads() == before


def test_thread_block_is_of_its_thread() -> None:
    before = fastbn.get_num_threads()
    seen = []
    with fastbn.use_num_threads(before + 3):
        thread = threading.Thread(target=lambda: seen.append(fastbn.get_num_threads()))
        thread.start()
        thread.join()
        assert fastbn.get_num_threads() == before + 3
    assert seen == [before]


@pytest.mark.parametrize("choose", [fastbn.set_num_threads, fastbn.use_num_threads])
@pytest.mark.parametrize(
    ("n", "error", "allowed"),
    [
        (0, ValueError, "positive"),
        (-1, ValueError, "positive"),
        (1.5, TypeError, "integer"),
        (2.0, TypeError, "integer"),
        (True, TypeError, "integer"),
        ("2", TypeError, "integer"),
        (None, TypeError, "integer"),
        (1025, ValueError, "1024"),
        (2**31, ValueError, "1024"),
        (2**70, ValueError, "1024"),
    ],
)
def test_bad_thread_count(choose: Any, n: Any, error: type[Exception], allowed: str, settings: None) -> None:
    before = fastbn.get_num_threads()

    def enter(n: Any) -> None:
        with choose(n) or fastbn.use_num_threads(1):
            pass

    assert_refused(enter, {"n": n}, error, "n", repr(n), allowed)
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("choose", [fastbn.set_num_threads, fastbn.use_num_threads])
def test_a_thread_count_that_python_does_not_print(choose: Any, settings: None) -> None:
    with pytest.raises(ValueError, match=r"^n: .*1024"), choose(10**5000) or fastbn.use_num_threads(1):
        pass


@pytest.mark.parametrize("n", [1000, 1024])
def test_more_threads_than_processors(kernel: cases.Kernel, n: int) -> None:
    """It is the most that may work."""
    c = cases.call((40, 19))
    wanted = fastbn.forward(c.x).y
    with fastbn.use_num_threads(n):
        cases.assert_same_bits(fastbn.forward(c.x).y, wanted)


def test_threads_without_openmp(settings: None) -> None:
    """The C backend has one, whatever is asked for; others have what they are given."""
    bridge = pytest.importorskip("fastbn._backends.c.bridge")
    if bridge.openmp():
        pytest.skip("this build has OpenMP")
    fastbn.set_num_threads(3)
    with fastbn.use_backend("c"):
        assert fastbn.get_num_threads() == 1
        with fastbn.use_num_threads(5):
            assert fastbn.get_num_threads() == 1
    with fastbn.use_backend("numpy"):
        assert fastbn.get_num_threads() == 3


# Instruction sets ----------------------------------------------------------------------------------------------------


def test_baseline_is_everywhere() -> None:
    if not ISAS:
        pytest.skip("the C backend is not built")
    assert ISAS[-1] == "baseline"
    assert set(ISAS) <= set(environment.ISAS)


@pytest.mark.parametrize("isa", ISAS)
def test_select_isa(isa: str) -> None:
    from fastbn._backends.c import bridge

    before = bridge.isa()
    bridge.select_isa(isa)
    assert bridge.isa() == isa
    assert isa in bridge.describe()["instruction set"]
    bridge.select_isa(before)


def test_unknown_isa() -> None:
    bridge = pytest.importorskip("fastbn._backends.c.bridge")
    before = bridge.isa()
    with pytest.raises(ValueError, match=r"'mmx'.*baseline"):
        bridge.select_isa("mmx")
    assert bridge.isa() == before


# The environment -----------------------------------------------------------------------------------------------------

USE = "import numpy as np, fastbn; fastbn.forward(np.ones((3, 2))); "


def printed(script: str, folder: Path, **environment: str) -> str:
    done = cases.run_python(script, folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", fastbn.backends())
def test_backend_of_the_environment(name: str, tmp_path: Path) -> None:
    script = USE + "print(fastbn.get_backend()); fastbn.set_backend('numpy'); print(fastbn.get_backend())"
    assert printed(script, tmp_path, FASTBN_BACKEND=name).split() == [name, "numpy"]


@pytest.mark.parametrize("isa", environment.ISAS)
def test_isa_of_the_environment(isa: str, tmp_path: Path) -> None:
    if isa not in ISAS:
        pytest.skip(f"this processor or build has no {isa}")
    script = USE + "from fastbn._backends.c import bridge; print(bridge.isa())"
    assert printed(script, tmp_path, FASTBN_ISA=isa) == isa


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"FASTBN_NUM_THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "5"}, "5"),
        ({"OMP_NUM_THREADS": "4,2"}, "4"),
        ({"FASTBN_NUM_THREADS": "1024"}, "1024"),
        ({"FASTBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"),
    ],
    ids=str,
)
def test_threads_of_the_environment(environment: dict[str, str], threads: str, tmp_path: Path) -> None:
    assert printed(USE + "print(fastbn.get_num_threads())", tmp_path, **environment) == threads


UNKNOWN = (
    ("FASTBN_BACKEND", "cuda", ("'c'", "'numba'", "'numpy'")),
    ("FASTBN_BACKEND", "NUMPY", ("'c'", "'numba'", "'numpy'")),
    ("FASTBN_ISA", "sse9", environment.ISAS),
    ("FASTBN_TUNING", "maybe", ("'on'", "'off'")),
    ("FASTBN_NUM_THREADS", "0", ("positive integer",)),
    ("FASTBN_NUM_THREADS", "-2", ("positive integer",)),
    ("FASTBN_NUM_THREADS", "many", ("positive integer",)),
    ("FASTBN_NUM_THREADS", "1.5", ("positive integer",)),
    ("FASTBN_NUM_THREADS", "1025", ("positive integer", "1024")),
    ("FASTBN_NUM_THREADS", "9" * 5000, ("positive integer", "1024")),
)


@pytest.mark.parametrize(("name", "value", "choices"), UNKNOWN)
def test_unknown_value_in_the_environment(name: str, value: str, choices: tuple[str, ...], tmp_path: Path) -> None:
    if name in ("FASTBN_ISA", "FASTBN_TUNING") and not ISAS:
        pytest.skip("the C backend is not built")
    done = cases.run_python(USE, tmp_path, **{name: value})
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert "another exception" not in done.stderr
    for word in (name, value, *choices):
        assert word in last


def test_isa_that_this_processor_lacks(tmp_path: Path) -> None:
    """Refused with those that it has; none of them is taken instead."""
    if not ISAS:
        pytest.skip("the C backend is not built")
    lacking = next(isa for isa in environment.ISAS if isa not in ISAS)
    done = cases.run_python(USE, tmp_path, FASTBN_ISA=lacking)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    for word in ("FASTBN_ISA", lacking, *ISAS):
        assert word in last


# show_config ---------------------------------------------------------------------------------------------------------


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    with fastbn.use_num_threads(13):
        assert fastbn.show_config() is None
    text = capsys.readouterr().out
    for word in (f"fastbn {fastbn.__version__}", "backend", "threads", "13", np.__version__, *fastbn.backends(), *ISAS):
        assert word in text
    if ISAS:
        for word in ("instruction set", "OpenMP", "L2", "KiB", "c: habits", "row_streams"):
            assert word in text


def test_show_config_tells_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    def line() -> str:
        fastbn.show_config()
        return next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "backend")

    usual = line()
    assert fastbn.backends()[0] in usual
    with fastbn.use_backend("numpy"):
        assert "numpy" in line()
        assert line() != usual
