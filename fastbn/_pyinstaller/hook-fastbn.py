"""Which modules does PyInstaller not find by reading? The backends, which are imported by their names.

The Numba backend is left out, with Numba: --hidden-import fastbn._backends.numba_backend brings both.
"""

from PyInstaller.utils.hooks import copy_metadata

hiddenimports = ["fastbn._backends.c.bridge", "fastbn._backends.numpy_backend"]
datas = copy_metadata("fastbn")  # which has the version
