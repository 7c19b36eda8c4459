"""What do the tests of installing run? Programs that must succeed, and the Python of a fresh environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple


def run(*command: object, folder: Path, **environment: str) -> str:
    """Runs a program that must succeed, without settings of Python's and fastbn's, and gives what it printed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FASTBN_", "PYTEST_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


class Environment(NamedTuple):
    """A virtual environment, and the folder above it, which is not a checkout."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def packages(self) -> Path:
        return Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())

    def run(self, *arguments: object, **environment: str) -> str:
        return run(self.python, *arguments, folder=self.folder, **environment)

    def pip(self, *arguments: object) -> str:
        return self.run("-m", "pip", "-q", *arguments)

    def files(self) -> set[str]:
        """All files of the environment, but compiled Python code."""
        everything = (path for path in (self.folder / "env").rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(self.folder).as_posix() for path in everything}
