"""Does the command line do what it says, and does it end well where the user errs?"""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest

import fastbn
from fastbn import cli
from fastbn.demo import report
from fastbn.demo import run as demo_run


def test_version():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fastbn", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fastbn {fastbn.__version__}\n"


def test_info_shows_the_configuration(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    fastbn.show_config()
    assert shown == capsys.readouterr().out
    assert fastbn.get_backend() in shown


def test_a_reader_that_stops_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-P", "-m", "fastbn", "info"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_demo_takes_its_options(monkeypatch):
    asked = []
    monkeypatch.setattr(demo_run, "run", lambda *arguments, **named: asked.append((*arguments, *named.values())))
    with fastbn.use_num_threads(3):
        assert cli.main(["demo"]) == 0
        assert cli.main(["demo", "--quick", "--seeds", "4", "--output", "x.png"]) == 0
    assert asked[0] == (report.FULL, "fastbn-demo.png", 3, None)
    assert asked[1][0].seeds == 4
    assert asked[1][0].rates == report.QUICK.rates
    assert asked[1][1:] == ("x.png", 1, None)


@pytest.mark.parametrize("rest", [["--help"], ["--quick", "--", "-x"], []])
def test_bench_gets_its_arguments_untouched(rest, monkeypatch):
    given = []
    bench, bench_cli = ModuleType("fastbn.bench"), ModuleType("fastbn.bench.cli")
    bench_cli.main = lambda argv: given.append(argv) or 7
    monkeypatch.setitem(sys.modules, "fastbn.bench", bench)
    monkeypatch.setitem(sys.modules, "fastbn.bench.cli", bench_cli)
    assert cli.main(["bench", *rest]) == 7
    assert given == [rest]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["demo", "--seeds", "0"], "seeds"),
        (["demo", "--output", "no/such/folder/x.png"], "output"),
        (["demo", "--output", "x.jpg"], "output"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, named, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastbn: " + named)
    assert printed.err.count("\n") == 1


def test_a_missing_extra_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo"]) == 2
    assert 'pip install "fastbn[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["train"], ["demo", "--seeds", "many"]])
def test_unknown_arguments_show_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: fastbn" in capsys.readouterr().err
