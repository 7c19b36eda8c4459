"""Which tables of measurements does the site show? Those of bench/results, by processor, where a page asks for them."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ASKED = "<!-- the tables of bench/results -->"


def _insert(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts the files in place of the comment, with their headings one level lower."""
    if ASKED not in source[0]:
        return
    folder = Path(app.srcdir).parent / "bench" / "results"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))]
    source[0] = source[0].replace(ASKED, re.sub(r"^(?=#+ )", "#", "\n\n".join(texts), flags=re.MULTILINE))


def setup(app: Sphinx) -> dict[str, Any]:
    """Changes the text of a page before it is parsed."""
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True}
