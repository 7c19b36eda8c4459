"""Does the C backend give the bits on record? On every instruction set but the baseline, for 1 and 3 threads."""

from __future__ import annotations

import bits
import cases
import pytest

import fastbn

FUSED = [kernel for kernel in cases.KERNELS if kernel.isa not in (None, "baseline")]
if not FUSED:
    pytest.skip("the C backend has no instruction set here beside the baseline", allow_module_level=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernel", FUSED, ids=str, indirect=True)
def test_bits_are_those_on_record(kernel: cases.Kernel, threads: int) -> None:
    with fastbn.use_num_threads(threads):
        found = bits.found()
    recorded = bits.recorded()
    changed = [name for name, value in found.items() if recorded.get(name) != value]
    assert not changed, f"{len(changed)} of {len(found)} calls: {', '.join(changed[:20])}"
    unknown = {name for name in recorded.keys() - found.keys() if "/bfloat16/" not in name}
    assert not unknown, f"on record, but not made: {sorted(unknown)[:20]}"
