"""Where do rich and matplotlib come from? From the extra "bench"; they are imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str) -> Any:
    """Imports a module, or raises an ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'the bench needs {module.split(".")[0]}: pip install "fastbn[bench]"') from error
