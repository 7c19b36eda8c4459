"""Runs a WebAssembly program with its arguments: python wasm.py program.wasm argument ..."""

import sys

from wasmtime import Engine, ExitTrap, Linker, Module, Store, WasiConfig

engine = Engine()
linker = Linker(engine)
linker.define_wasi()
store = Store(engine)
settings = WasiConfig()
settings.argv = sys.argv[1:]
settings.inherit_stdout()
settings.inherit_stderr()
store.set_wasi(settings)
try:
    start = linker.instantiate(store, Module.from_file(engine, sys.argv[1])).exports(store)["_start"]
    start(store)  # type: ignore[operator]
except ExitTrap as ended:
    sys.exit(ended.code)
