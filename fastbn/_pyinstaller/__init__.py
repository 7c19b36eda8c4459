"""What does PyInstaller need to know to freeze a program with fastbn? An entry point names this folder to it."""

from pathlib import Path


def hook_dirs() -> list[str]:
    """The folder of the hooks."""
    return [str(Path(__file__).parent)]
