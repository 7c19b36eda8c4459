"""What does a checkout that was never built say when it is imported?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbn

PACKAGE = Path(fastbn.__file__).parent


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of a clone: the package without what the build makes, and setup.py."""
    folder = tmp_path_factory.mktemp("clone")
    built = shutil.ignore_patterns("*.so", "*.pyd", "*.a", "*.lib", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fastbn", ignore=built)
    (folder / "setup.py").write_text("")
    return folder


def run(folder: Path, script: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python, started in the folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FASTBN_BACKEND", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *options, "-c", script],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("script", "backend"),
    [
        *(("import fastbn", backend) for backend in (None, "", "c", "cuda")),
        ("import fastbn.inference", None),
        ("from fastbn._backends import numpy_backend", None),
    ],
)
def test_import_says_what_happened(unbuilt: Path, script: str, backend: str | None) -> None:
    """Also where fastbn is installed, which this folder hides."""
    done = run(unbuilt, script, **({} if backend is None else {"FASTBN_BACKEND": backend}))
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("ImportError") :]
    for word in (str(unbuilt / "fastbn"), "bridge", "missing", "not built", f'python -m pip install -e "{unbuilt}"'):
        assert word in last


def test_outside_a_checkout(unbuilt: Path, tmp_path: Path) -> None:
    """The command is another one."""
    shutil.copytree(unbuilt / "fastbn", tmp_path / "fastbn")
    done = run(tmp_path, "import fastbn")
    assert done.returncode == 1
    assert "python -m pip install --force-reinstall fastbn" in done.stderr
    assert str(tmp_path / "fastbn") in done.stderr


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_a_backend_that_was_asked_for(unbuilt: Path, name: str) -> None:
    """Works, and the version is not that of another fastbn, which may be installed.

    Numba runs its loops as Python here: that they compile does not depend on the build, and takes long.
    """
    if name not in fastbn.backends():
        pytest.skip(f"{name} is not usable here")
    script = (
        "import fastbn, numpy as np; x = np.array([[1.0, 10.0], [3.0, 30.0]]); y, cache = fastbn.forward(x, eps=0.0); "
        "print(fastbn.__file__, fastbn.get_backend(), fastbn.__version__, 'c' in fastbn.backends(), y.tolist()); "
        "fastbn.backward(y, cache); fastbn.show_config()"
    )
    done = run(unbuilt, script, FASTBN_BACKEND=name, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    wanted = [[-1.0, -1.0], [1.0, 1.0]]
    assert first == f"{unbuilt / 'fastbn' / '__init__.py'} {name} 0+unknown False {wanted}"


def test_an_extension_that_cannot_be_loaded(unbuilt: Path, tmp_path: Path) -> None:
    """Is an error at once, but for those who asked for another backend."""
    [extension] = [
        path.name for path in (PACKAGE / "_backends" / "c").glob("bridge.*") if path.suffix in (".so", ".pyd")
    ]
    shutil.copytree(unbuilt / "fastbn", tmp_path / "fastbn")
    (tmp_path / "fastbn" / "_backends" / "c" / extension).write_bytes(b"no library")
    script = "import fastbn, numpy as np; print(fastbn.forward(np.array([[1.0], [3.0]]), eps=0.0).y.tolist())"
    done = run(tmp_path, script, FASTBN_BACKEND="numpy")
    assert (done.returncode, done.stdout.strip()) == (0, "[[-1.0], [1.0]]"), done.stderr
    done = run(tmp_path, script)
    assert done.returncode == 1
    assert "ImportError" in done.stderr


def test_nothing_is_installed(unbuilt: Path) -> None:
    """As far as Python can see: no site-packages but NumPy, no version in the metadata."""
    script = (
        f"import sys; sys.path[:0] = [{str(unbuilt)!r}]; import importlib.metadata as m\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.version = m.distribution = none\n"
        "import fastbn; print(fastbn.__version__)"
    )
    done = run(unbuilt, script, FASTBN_BACKEND="numpy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0+unknown"
    done = run(unbuilt, script)
    assert "ImportError: fastbn was imported from" in done.stderr


def test_the_installed_package_is_built() -> None:
    assert fastbn.__version__ != "0+unknown"
    assert fastbn.backends()[0] == "c"
    assert np.isfinite(fastbn.forward(np.ones((2, 1), np.float32), backend="c").y).all()
