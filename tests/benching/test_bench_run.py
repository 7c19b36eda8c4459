"""Does fastbn.bench.run say what is wrong with its arguments, and what does not run?"""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re

import pytest

pytest.importorskip("rich", reason='needs pip install "fastbn[bench]"')
pytest.importorskip("matplotlib", reason='needs pip install "fastbn[bench]"')
bench = importlib.import_module("fastbn.bench")
rows = importlib.import_module("fastbn.bench.rows")

FIELDS = (
    "pass layout dtype shape threads contestant kind seconds spread samples gb_per_s bytes_moved others agrees "
    "difference activation strides result mask residual noisy"
)


def test_the_schema_is_what_it_was():
    """Another name or meaning needs another number in `rows.SCHEMA`; new fields are added here."""
    assert rows.SCHEMA == 1
    found = bench.run([(8, 64)], passes="FORWARD", backends=["numpy"], results="fresh", threads=1, seconds=0.001)
    assert [row["contestant"] for row in found] == ["copy", "fastbn numpy"]
    assert all(" ".join(row) == FIELDS for row in found)
    assert json.loads(json.dumps(found)) == found
    assert all(rows.from_json(row).as_json() == row for row in found)
    ours = found[1]
    assert (ours["pass"], ours["layout"], ours["shape"], ours["result"]) == ("forward", "nc", [8, 64], "fresh")
    assert ours["seconds"] > 0
    assert set(ours["others"]) == {"copy", "out="}


def test_the_example_of_run_holds():
    (example,) = doctest.DocTestFinder(recurse=False).find(bench.run, "run")
    assert doctest.DocTestRunner().run(example) == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"shapes": (8, 40, 50, 30)}, TypeError, "shapes: got (8, 40, 50, 30); allowed: text such as"),
        ({"shapes": 8}, TypeError, "shapes: got 8; allowed: text such as"),
        ({"shapes": []}, ValueError, "shapes: got nothing; allowed: text such as"),
        ({"shapes": "axb"}, ValueError, "shapes: got 'axb'; allowed: resnet50"),
        ({"peers": True}, TypeError, "peers: got True; allowed: text with commas, or a sequence of text"),
        ({"peers": "cudnn"}, ValueError, "peers: got cudnn; allowed: all"),
        ({"passes": "sideways"}, ValueError, "passes: got sideways; allowed: all, forward"),
        ({"passes": 1}, TypeError, "passes: got 1; allowed: text with commas"),
        ({"dtypes": ()}, ValueError, "dtypes: got nothing; allowed: all, float32"),
        ({"backends": [None]}, TypeError, "backends: got [None]; allowed: text with commas"),
        ({"backends": ""}, ValueError, "backends: got nothing; allowed here: all"),
        ({"threads": 1.5}, TypeError, "threads: got 1.5; allowed: all, or positive integers"),
        ({"threads": True}, ValueError, "threads: got 'True'; allowed: all, or positive integers"),
        ({"batch": "4"}, TypeError, "batch: got '4'; allowed: a positive integer"),
        ({"seconds": "2"}, TypeError, "seconds: got '2'; allowed: a number"),
        ({"seconds": math.inf}, ValueError, "seconds: got inf; allowed: a finite number"),
        ({"mask": "no"}, TypeError, "mask: got 'no'; allowed: True or False"),
        ({"progress": None}, TypeError, "progress: got None; allowed: a function"),
        ({"shapes": "1x4x1x1", "passes": "forward"}, ValueError, "shapes: got 1x4x1x1, of which nothing is left to"),
    ],
)
def test_run_names_the_argument(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)) as raised:
        bench.run(**({"shapes": "8x64"} | arguments))
    assert str(raised.value).startswith(text)


def test_run_warns_of_what_does_not_run():
    asked = {"passes": "forward", "backends": "numpy", "threads": 1, "seconds": 0.001, "activations": "silu"}
    with pytest.warns(RuntimeWarning, match="fastbn numpy does not run: NotImplementedError: in place"):
        assert bench.run("8x64", results="inplace", **asked) == []
