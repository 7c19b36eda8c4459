"""How is the documentation built? By Sphinx, from Markdown (MyST) whose examples run while it is built."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import fastbn

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fastbn"
author = "the fastbn developers"
copyright = author
version = release = fastbn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_nb",
    "sphinx_copybutton",
    "c_header",
    "internal_links",
    "mathml",
    "measurements",
]
exclude_patterns = ["_build"]

# A name that is not there fails the build; but an argument may have the name of something else.
nitpicky = True
nitpick_ignore = [("c:identifier", "size_t"), ("c:identifier", "int64_t"), ("py:obj", "fastbn.bench.rows.SCHEMA")]
nitpick_ignore_regex = [("py:obj", "[a-z_]+")]

templates_path = ["_templates"]

# Docstrings: names in single backticks are links where Sphinx knows them, as in NumPy's.
default_role = "autolink"
autodoc_mock_imports = ["mpi4py"]  # which cannot be imported without an MPI library
autodoc_typehints = "none"  # the sections "Parameters" say more
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
autosummary_ignore_module_all = False
numpydoc_show_class_members = False  # the template lists them
python_maximum_signature_line_length = 90

# Pages: their code cells run, each page in a process of its own, and an error in one fails the build.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "remove-warn"
nb_merge_streams = True

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = f"fastbn {release}"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_sidebars = {page: [] for page in ("index", "install", "tutorial", "troubleshooting")}
html_copy_source = False
html_domain_indices = False  # the list of modules would repeat the reference's
html_show_sourcelink = False
html_theme_options = {
    "github_url": "https://github.com/fastbn/fastbn",
    "logo": {"text": "fastbn"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

# Public sites that turn away programs, or that are not there yet; see the step that checks links in CI.
linkcheck_ignore = [r"https://github\.com/fastbn/fastbn"]
linkcheck_anchors = False


def _take_bars_literally(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In docstrings, |x| is an absolute value, except in tables."""
    kept = ("|", "+-", ">>>", "...")
    lines[:] = [line if line.lstrip().startswith(kept) else line.replace("|", r"\|") for line in lines]


LISTS = ("Parameters", "Attributes", "Returns", "Raises", "Warns")


def _name_what_follows(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Gives examples a heading, and a paragraph after a list of parameters, which numpydoc takes for one of them."""
    section, found = "", list[str]()
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if re.fullmatch(r"-{3,}", after):
            section = line
        elif section and line and not before and not line.startswith(" "):
            needed = "Examples" if line.startswith(">>>") else "Notes" if section in LISTS else section
            if needed != section:
                section = needed
                found += [section, "-" * len(section)]
        found.append(line)
    lines[:] = found


def _skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples: the section "Attributes" describes them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Connects what the extensions above do not do."""
    app.connect("autodoc-process-docstring", _name_what_follows, priority=400)
    app.connect("autodoc-process-docstring", _take_bars_literally)
    app.connect("autodoc-skip-member", _skip_fields)
