"""What does the reference of the C API say? What fastbn.h says: its comments, beside its declarations.

The header is written in paragraphs: a comment, followed by what it describes. A comment `---- words ----` is a heading.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

COMMENT = re.compile(r"/\*(.*?)\*/\n?", re.DOTALL)
FUNCTION = re.compile(r"^(?!typedef)([\w *]+?\bfbn_\w+\([^)]*\));", re.MULTILINE)
TYPE = re.compile(r"^typedef [^;{]*?(?:\{.*?\})?\s*(\w+);", re.MULTILINE | re.DOTALL)
MACRO = re.compile(r"^#define (FBN_\w+).*", re.MULTILINE)
ENUMERATORS = re.compile(r"^enum \{(.*?)\};", re.MULTILINE | re.DOTALL)  # without a name


class Paragraph(NamedTuple):
    """A comment and the declarations that follow it."""

    comment: str
    code: str


def paragraphs(header: str) -> list[Paragraph]:
    """Those of the header, without what only a compiler needs."""
    kept = re.sub(r"^#(?!define FBN_).*(\n)|^extern .*\n|^}\n|^#define FASTBN_H\n", "\n", header, flags=re.MULTILINE)
    found = []
    for text in re.split(r"\n\s*\n", kept):
        comment = COMMENT.match(text.strip() + "\n")
        words = re.sub(r"^ ?\* ?", "", comment[1], flags=re.MULTILINE).strip() if comment else ""
        code = text.strip()[len(comment[0]) if comment else 0 :].strip()
        if words or code:
            found.append(Paragraph(words, code))
    return found


def _prose(comment: str) -> list[str]:
    """A comment as reStructuredText: its paragraphs, of which lines that are indented stay as they are."""
    lines: list[str] = []
    for part in re.split(r"\n\s*\n", comment):
        for indented, together in groupby(part.split("\n"), lambda line: line.startswith("    ")):
            text = list(together)
            lines += ["::", "", *text, ""] if indented else [_linked(" ".join(text)), ""]
    return lines


def _linked(text: str) -> str:
    """Functions and types as links, and other names of code in the font of code."""
    text = text.replace("*", r"\*").replace("|", r"\|")
    text = re.sub(r"`([^`]+)`", r"``\1``", text)
    text = re.sub(r"^([A-Z]\w+\.) ", r"**\1** ", text)
    text = re.sub(r"(?<!`)\b(fbn_\w+)\b(?:\(\))?(?!`)", r":c:expr:`\1`", text)
    return re.sub(r"(?<![`\w])(FBN_[A-Z0-9_]+)\b", r"``\1``", text)


def _object(kind: str, signatures: list[str], body: list[str]) -> list[str]:
    first, *others = [" ".join(signature.split()) for signature in signatures]
    return [f".. c:{kind}:: {first}", *(f"   {line}" for line in [*others, "", *body]), ""]


def _code(code: str) -> list[str]:
    return [".. code-block:: c", "", *(f"   {line}" for line in code.split("\n")), ""]


def _described(paragraph: Paragraph) -> list[str]:
    """The objects that a paragraph declares. The first has the prose: a function, if there is one."""
    prose, code = _prose(paragraph.comment), paragraph.code
    functions = [("function", [found[1]], list[str]()) for found in FUNCTION.finditer(code)]
    types = [("type", [found[1]], _code(found[0])) for found in TYPE.finditer(code)]
    macros = [("macro", [found[1]], _code(found[0])) for found in MACRO.finditer(code)]
    enumerators = [("macro", re.findall(r"FBN_\w+", found[1]), _code(found[0])) for found in ENUMERATORS.finditer(code)]
    objects = [*functions, *types, *macros, *enumerators]
    if not objects:
        return prose
    lines: list[str] = []
    for kind, signatures, body in objects:
        lines += _object(kind, signatures, [*prose, *body])
        prose = []
    return lines


class CHeader(SphinxDirective):
    """``.. c-header:: path``: the contents of a header, with its headings as sections."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir, self.arguments[0]).resolve()
        self.env.note_dependency(str(path))
        lines: list[str] = []
        for paragraph in paragraphs(path.read_text(encoding="utf-8")):
            heading = re.fullmatch(r"---- (.*) ----", paragraph.comment)
            if heading:
                title = heading[1][0].upper() + heading[1][1:]
                lines += [title, "-" * len(title), ""]
            else:
                lines += _described(paragraph)
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("c-header", CHeader)
    return {"parallel_read_safe": True}
