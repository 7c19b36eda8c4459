"""Where do rich and matplotlib come from? The bench extra, imported when needed."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str) -> Any:
    """The module, or an ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'the bench needs {module.split(".")[0]}: pip install "fastbn[bench]"') from error
