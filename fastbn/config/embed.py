"""What does a compiler need to build against fastbn? The C header, the static library, and their flags."""

import os
import shlex
import subprocess
from pathlib import Path

_HERE = Path(__file__).parent.parent
_LIBRARY = "fastbn.lib" if os.name == "nt" else "libfastbn.a"


def get_include() -> str:
    """The folder of fastbn.h, the header of the C API, for a compiler's -I; Cython's `cfastbn` needs it, too.

    Raises FileNotFoundError if fastbn was built without its C core.

    >>> import fastbn
    >>> fastbn.get_include().endswith("include")
    True
    """
    return str(_existing("include", "fastbn.h").parent)


def get_library() -> str:
    """The path of the C core as a static library: the code that fastbn itself runs, which does not need Python.

    `fastbn info --libs` prints all that a linker needs. Raises FileNotFoundError if fastbn was built without
    its C core.

    >>> import fastbn
    >>> "fastbn" in fastbn.get_library()
    True
    """
    return str(_existing("lib", _LIBRARY))


def cflags() -> str:
    """The flags that compile against fastbn, quoted for a shell if necessary."""
    return _quoted([f"-I{get_include()}"])


def libs() -> str:
    """The flags that link it, to be put after the sources: the library, OpenMP's flag if it was built with it, -lm."""
    flags = _existing("lib", "link-flags.txt").read_text(encoding="utf-8").split()
    return _quoted([get_library(), *flags])


def _existing(*parts: str) -> Path:
    path = _HERE.joinpath(*parts)
    if not path.is_file():
        how = 'python -m pip install . (or, in a checkout, "python setup.py build_ext --inplace")'
        raise FileNotFoundError(f"{path} is missing: this fastbn was installed without its C core; {how} builds it")
    return path


def _quoted(flags: list[str]) -> str:
    return subprocess.list2cmdline(flags) if os.name == "nt" else shlex.join(flags)
