"""Is every public name documented, and does every example in docstrings and in README.md run?"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest

import fastbn

README = cases.CHECKOUT / "README.md"
PUBLIC = ("fastbn", "fastbn.dask", "fastbn.mpi", "fastbn.numba", "fastbn.onnx", "fastbn.torch")
NAMES = tuple(name for name in fastbn.__all__ if name != "__version__")


def documented_modules() -> list[str]:
    """The modules in Python, without bench."""
    found = ["fastbn"]
    for package in (
        "fastbn",
        "fastbn._backends",
        "fastbn._backends.c",
        "fastbn.call",
        "fastbn.config",
        "fastbn.demo",
        "fastbn.torch",
    ):
        folder = Path(fastbn.__file__).parent.joinpath(*package.split(".")[1:])
        found += [
            f"{package}.{module.name}" for module in pkgutil.iter_modules([str(folder)]) if module.name != "bench"
        ]
    return [name for name in found if not name.endswith("bridge")]


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs an extra: {error}")


@pytest.mark.parametrize("name", PUBLIC)
def test_completion_offers_what_is_public(name: str) -> None:
    module = imported(name)
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


UNCLEAR = re.compile(r"\bAny\b|ForwardRef|(?<!dask\.array\.core\.)Array|ndarray\[")
"""Except for the class of Dask, with its module, Array is an alias."""


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_read_well(name: str) -> None:
    """As help() shows them: types by their names, and no alias that only its module explains."""
    module = imported(name)
    for public in (getattr(module, public) for public in module.__all__):
        if not callable(public) or (inspect.isclass(public) and not signed_here(public)):
            continue
        members = [member for key, member in vars(public).items() if key == "__call__" or not key.startswith("_")]
        for signed in (public, *(member for member in members if inspect.isroutine(member))):
            found = inspect.signature(getattr(signed, "__func__", signed))
            named = [p.annotation for p in found.parameters.values() if p.kind is not p.VAR_KEYWORD]
            for annotation in (*named, found.return_annotation):
                text = inspect.formatannotation(annotation)
                assert not isinstance(annotation, str), f"{signed}: {text} is not resolved"
                assert not re.search(r"\bAny\b|ForwardRef|(?<!dask\.array\.core\.)Array|ndarray\[", text), (
                    f"{signed}: {text}"
                )


def signed_here(public: type) -> bool:
    """Whether a class has a constructor of fastbn's own, or a signature that it gives itself."""
    return "__signature__" in vars(public) or any(name in vars(public) for name in ("__init__", "__new__"))


@pytest.mark.parametrize("name", documented_modules())
def test_docstrings_run(name: str, settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = imported(name)
    report: list[str] = []
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_an_example(name: str) -> None:
    documentation = inspect.getdoc(getattr(fastbn, name)) or ""
    assert re.search(r"^>>> .*\bfastbn\b", documentation, flags=re.MULTILINE)


def test_all_names_are_public() -> None:
    """__all__ has what `fastbn` exports, in order and nothing private."""
    found = {name for name, value in vars(fastbn).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert found | {"__version__"} <= set(fastbn.__all__)
    assert list(fastbn.__all__) == sorted(fastbn.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_methods_are_documented(name: str) -> None:
    public = getattr(fastbn, name)
    if not inspect.isclass(public):
        assert public.__doc__
        return
    documentation = public.__doc__ or ""
    for member, value in vars(public).items():
        if member.startswith("_") or not (callable(value) or isinstance(value, (property, classmethod))):
            continue
        described = (inspect.getdoc(getattr(public, member)) or "") or re.search(rf"\b{member}\b", documentation)
        assert described, f"{name}.{member}"


def with_parameters() -> dict[str, tuple[Any, str]]:
    """The public functions, constructors and methods, and the documentation in which their parameters must be."""
    found = {}
    for name in NAMES:
        public = getattr(fastbn, name)
        found[name] = public, inspect.getdoc(public) or ""
        for member, value in vars(public).items() if inspect.isclass(public) else ():
            if member == "__call__" or (inspect.isroutine(value) and not member.startswith("_")):
                found[f"{name}.{member}"] = getattr(public, member), inspect.getdoc(getattr(public, member)) or ""
    return found


@pytest.mark.parametrize("name", with_parameters())
def test_parameters_are_documented(name: str) -> None:
    """Each is named, and so is what a function that takes any may raise."""
    public, documentation = with_parameters()[name]
    if inspect.isclass(public) and not signed_here(public):
        return
    passed_on = {"self", "args", "kwargs", "parts", "num_features"}  # of the other constructors: as in BatchNorm
    named = set(inspect.signature(public).parameters) - passed_on
    assert {parameter for parameter in named if not re.search(rf"\b{parameter}\b", documentation)} == set()
    if named and name not in NEVER_RAISE:
        assert re.search(r"\b(Raises|errors)\b", documentation), documentation


@pytest.mark.parametrize("name", ["forward", "backward", "infer"])
def test_functions_for_jitted_code_are_documented(name: str) -> None:
    """They do not send the reader to the functions of `fastbn`, whose arguments differ."""
    public = getattr(imported("fastbn.numba"), name)
    documentation = inspect.getdoc(public) or ""
    assert {
        name for name in inspect.signature(public).parameters if not re.search(rf"\b{name}\b", documentation)
    } == set()
    assert re.search(r"^Raises$", documentation, flags=re.MULTILINE)
    assert re.search(r"^>>> .*\bfastbn\.numba\b", documentation, flags=re.MULTILINE)


NEVER_RAISE = {"Forward", "Gradients"}
"""What only fastbn makes."""


@pytest.mark.parametrize("name", NAMES)
def test_properties_are_documented(name: str) -> None:
    properties = inspect.getmembers(getattr(fastbn, name), lambda member: isinstance(member, property))
    assert [member for member, value in properties if not value.__doc__] == []


def readme_blocks() -> list[str]:
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests: no checkout")
def test_readme_has_examples() -> None:
    assert readme_blocks()


@pytest.mark.parametrize("number", range(len(readme_blocks())))
def test_readme_runs(number: int, tmp_path: Path) -> None:
    """Each block is a script that runs by itself; one that needs a peer that is missing is skipped."""
    done = cases.run_python(readme_blocks()[number], tmp_path)
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)'", done.stderr)
    if missing and missing[1] != "fastbn":
        pytest.skip(f"needs {missing[1]}")
    assert done.returncode == 0, done.stderr


EXAMPLES = cases.CHECKOUT / "examples"
in_checkout = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not beside the tests: no checkout")


@in_checkout
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_run(example: Path) -> None:
    """By a test of what they show, here or elsewhere. Their commands are in a table: tests/core/test_embed.py."""
    tests = (path.read_text(encoding="utf-8") for path in (cases.CHECKOUT / "tests").rglob("test_*.py"))
    assert any(f'"{example.name}"' in text for text in tests)


@in_checkout
def test_streaming_example(tmp_path: Path) -> None:
    """On little data, which comes out normalized."""
    pytest.importorskip("rich")
    example = EXAMPLES / "streaming_moments.py"
    script = f"import runpy, sys; sys.argv[1:] = ['--gigabytes', '0.02']; runpy.run_path({str(example)!r}, None, "
    done = cases.run_python(script + "'__main__')", tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"y: mean at most (\S+), variance (\S+) to (\S+)", done.stdout)
    assert found, done.stdout
    mean, low, high = map(float, found.groups())
    assert mean < 1e-5
    assert low == pytest.approx(1, rel=1e-4)
    assert high == pytest.approx(1, rel=1e-4)


NAMED = re.compile(r"(?<![\w/.<-])((?:\w+/)*\w+\.(?:pyx|pxi|pxd|pyi|py|cpp|c|h))\b(?!\()")
SOURCES = ("py", "pyx", "pxi", "pxd", "pyi", "c", "h")
ELSEWHERE = {
    "fastbn/include/fastbn.h",
    "Python.h",
    "numpy/arrayobject.h",
    "dnnl_types.h",
    "probe.c",
    "program.c",
    "service.py",
}


@in_checkout
def test_files_that_are_named_exist() -> None:
    """In texts, comments and docstrings of the package, the core, the bench and the build."""
    files = {
        path.relative_to(cases.CHECKOUT).as_posix()
        for folder in ("fastbn", "src_c", "bench", "docs", "tests", "examples")
        for path in (cases.CHECKOUT / folder).rglob("*.*")
    } | {"setup.py"}
    texts = [cases.CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "src_c/README.md", "setup.py")]
    texts += [path for path in (cases.CHECKOUT / "docs").rglob("*.md") if "_build" not in path.parts]
    for folder in ("fastbn", "src_c", "bench"):
        texts += [
            path
            for path in (cases.CHECKOUT / folder).rglob("*.*")
            if path.suffix[1:] in SOURCES and path.name != "bridge.c"
        ]
    missing = [
        f"{path.relative_to(cases.CHECKOUT)}: {name}"
        for path in texts
        if path.name != "bridge.c"  # which a build has made
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
        if name not in ELSEWHERE and not any(file == name or file.endswith(f"/{name}") for file in files)
    ]
    assert missing == []
