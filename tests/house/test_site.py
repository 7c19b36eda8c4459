"""Is what the documentation names there? Links and their anchors, commands and their options, extras, public names."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tomllib
from pathlib import Path

import cases
import pytest

from fastbn import cli
from fastbn.config import environment

DOCS = cases.CHECKOUT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="docs is not beside the tests: no checkout")

PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TEXTS = [
    *(cases.CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "src_c/README.md")),
    *PAGES,
]
README = TEXTS[0]
named = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(cases.CHECKOUT).as_posix())

LINK = re.compile(r"\]\(([^)\s]+)\)")
PUBLISHED = re.compile(
    r"https://(?:github\.com/fastbn/fastbn/(?:blob|tree)|raw\.githubusercontent\.com/fastbn/fastbn)/main/([^)\s#]+)"
)
INCLUDED = re.compile(r"^`{3,}\{(?:literalinclude|include)\} (\S+)", re.MULTILINE)


def prose(path: Path) -> str:
    """A text without its blocks of code."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Those of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named
def test_links_lead_to_files(path: Path) -> None:
    """Those to other sites: `sphinx-build -b linkcheck docs docs/_build/links`, where there is a network."""
    for link in LINK.findall(prose(path)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        made = DOCS / "api" / "generated" in found.parents and found.suffix == ".rst"  # by autosummary
        assert found.exists() or made, f"{link} is not there"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{link}: no such heading"
    for included in INCLUDED.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / included).is_file(), included


@named
def test_addresses_in_the_repository_lead_to_files(path: Path) -> None:
    for published in PUBLISHED.findall(path.read_text(encoding="utf-8")):
        assert (cases.CHECKOUT / published).exists(), published


def test_readme_can_be_read_elsewhere() -> None:
    """A package index shows it, where a relative link leads nowhere."""
    links = LINK.findall(prose(README))
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_examples_on_pages_run(path: Path) -> None:
    """The build of the site runs code-cells, and tests run what is included; nothing else may claim to be Python."""
    assert "```python" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_pictures_say_what_they_show(path: Path) -> None:
    """In words, for readers who do not see them."""
    text = path.read_text(encoding="utf-8")
    assert "![]" not in text
    assert text.count("figure.show()") == len(re.findall(r"^    alt: ", text, flags=re.MULTILINE))


def helped(command: str) -> str:
    """What a command's --help prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return printed.getvalue()


@named
def test_commands_have_their_options(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for command, rest in re.findall(r"\bfastbn (demo|bench|info|test|tune)\b([^`\n|&]*)", text):
        for option in re.findall(r"(?<!\S)--\w[\w-]*", rest):
            assert option == "--help" or option in helped(command), f"fastbn {command} {option}"


@named
def test_extras_exist(path: Path) -> None:
    project = tomllib.loads((cases.CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for names in re.findall(r'pip install "(?:fastbn|\.)\[([\w,]+)\]"', path.read_text(encoding="utf-8")):
        assert set(names.split(",")) <= set(project["optional-dependencies"]), names


@pytest.mark.parametrize("name", ["fastbn", "bench", "dask", "mpi", "numba", "onnx", "torch"])
def test_public_names_are_in_the_reference(name: str) -> None:
    try:
        module = importlib.import_module("fastbn" if name == "fastbn" else f"fastbn.{name}")
    except ImportError as error:
        pytest.skip(f"needs an extra: {error}")
    text = (DOCS / "api" / f"{name}.rst").read_text(encoding="utf-8")
    listed = set(re.findall(r"^   (\w+)$", text, flags=re.MULTILINE))
    assert listed == set(module.__all__) - {"__version__"}


def test_environment_variables_are_documented() -> None:
    """Those that the package reads."""
    folder = Path(environment.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    text = (DOCS / "howto" / "threads.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bFASTBN_[A-Z_]+\b", sources)) - {"FASTBN_OPENMP"} <= set(re.findall(r"\bFASTBN_\w+", text))


def test_c_reference_has_the_whole_header(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="the site is built with sphinx")
    monkeypatch.setattr(sys, "path", [str(DOCS / "_ext"), *sys.path])
    reader = importlib.import_module("c_header")
    header = (cases.CHECKOUT / "src_c" / "fastbn.h").read_text(encoding="utf-8")
    page = "\n".join(line for paragraph in reader.paragraphs(header) for line in reader._described(paragraph))
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    functions, types = (
        re.findall(r"\b(fbn_\w+)\(", code),
        re.findall(r"^(?:typedef .*?|\} )(fbn_\w+);", code, re.MULTILINE),
    )
    assert len(functions) > 15
    assert len(types) > 15
    assert [name for name in functions if not re.search(rf"c:function:: .*\b{name}\(", page)] == []
    assert [name for name in types if f"c:type:: {name}\n" not in page] == []
