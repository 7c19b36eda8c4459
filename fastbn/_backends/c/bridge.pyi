"""The bridge's functions have no types: they are called by name, as a `Backend`, as the express lane and by tests."""

from typing import Any

def __getattr__(name: str) -> Any: ...
