"""Which shapes are timed? Sets of shapes by name, and how --shapes is read. Every shape is written channels-first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Shape = tuple[int, ...]

# The distinct shapes (channels, *spatial) of each network's batch norms, for images of 224x224 and volumes of
# 64x128x128.

RESNET50: tuple[Shape, ...] = (
    (64, 112, 112),
    (256, 56, 56),
    (128, 56, 56),
    (64, 56, 56),
    (512, 28, 28),
    (256, 28, 28),
    (128, 28, 28),
    (1024, 14, 14),
    (512, 14, 14),
    (256, 14, 14),
    (2048, 7, 7),
    (512, 7, 7),
)

VGG16: tuple[Shape, ...] = ((64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14))

MOBILENETV2: tuple[Shape, ...] = (
    *((channels, 112, 112) for channels in (16, 32, 96)),
    *((channels, 56, 56) for channels in (24, 96, 144)),
    *((channels, 28, 28) for channels in (32, 144, 192)),
    *((channels, 14, 14) for channels in (64, 96, 192, 384, 576)),
    *((channels, 7, 7) for channels in (160, 320, 576, 960, 1280)),
)


def _densenet121() -> Iterator[Shape]:
    """In a dense block, the input of each layer has 32 channels more than the last one's; its bottleneck has 128."""
    yield (64, 112, 112)
    for size, first, last in ((56, 64, 256), (28, 128, 512), (14, 256, 1024), (7, 512, 1024)):
        for channels in sorted({128, *range(first, last + 1, 32)}):
            yield (channels, size, size)


UNET3D: tuple[Shape, ...] = (
    (32, 64, 128, 128),
    (64, 64, 128, 128),
    (64, 32, 64, 64),
    (128, 32, 64, 64),
    (128, 16, 32, 32),
    (256, 16, 32, 32),
    (256, 8, 16, 16),
    (512, 8, 16, 16),
)

NETWORKS: dict[str, tuple[int, tuple[Shape, ...]]] = {
    "resnet50": (32, RESNET50),
    "vgg16": (32, VGG16),
    "mobilenetv2": (32, MOBILENETV2),
    "densenet121": (32, tuple(_densenet121())),
    "unet3d": (1, UNET3D),
    "inference": (1, RESNET50),
}
"""The sets that --batch applies to: the default batch size, and the shapes of one example."""

FIXED: dict[str, tuple[Shape, ...]] = {
    "dense": ((32, 128), (64, 512), (256, 1024), (1024, 1024), (128, 4096), (4096, 256), (65536, 64)),
    "latency": ((1, 64), (8, 64), (32, 64), (8, 256), (1, 64, 7, 7), (2, 16, 8, 8)),
    "operation": ((32, 64, 112, 112), (32, 256, 56, 56)),
    "targets": (
        (32, 64, 112, 112),
        (32, 256, 56, 56),
        (32, 512, 28, 28),
        (32, 1024, 14, 14),
        (32, 2048, 7, 7),
        (256, 1024),
        (1, 256, 56, 56),
        (1, 64),
        (8, 64),
    ),
}
"""The sets whose shapes include the batch. The shapes of `operation` are larger than any cache."""

NAMES = (*NETWORKS, *FIXED)


def _one(word: str, batch: int | None) -> tuple[Shape, ...]:
    if word in FIXED:
        return FIXED[word]
    if word in NETWORKS:
        default, shapes = NETWORKS[word]
        return tuple((batch or default, *shape) for shape in shapes)
    return (_sizes(word),)


def _sizes(word: str) -> Shape:
    """A shape of sizes with an x or another sign of multiplication between them."""
    sizes = word.replace("\u00d7", "x").replace("*", "x").split("x")
    if not any(size.isdecimal() for size in sizes):
        near = difflib.get_close_matches(word, NAMES)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--shapes: got {word!r}{meant}; allowed: {', '.join(NAMES)}, or sizes such as 32x64x56x56")
    if len(sizes) < 2:
        raise ValueError(
            f"--shapes: got {word!r}, one size; allowed: examples x channels, and sizes of space, such as {word}x64 or "
            f"{word}x64x56x56, or {', '.join(NAMES)}"
        )
    wrong = [size for size in sizes if not (size.isdecimal() and int(size) > 0)]
    if wrong:
        raise ValueError(
            f"--shapes: got {word!r}, in which {wrong[0]!r} is not a positive integer; allowed: sizes such as "
            f"32x64x56x56, with commas between shapes, or {', '.join(NAMES)}"
        )
    return tuple(map(int, sizes))


def items(option: str, given: Any, kinds: tuple[type, ...], allowed: str) -> list[Any]:
    """The items of text with commas or of a sequence of these kinds. Raises TypeError for anything else."""
    found = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, Iterable) else None
    if found is None or not all(isinstance(item, kinds) for item in found):
        raise TypeError(f"{option}: got {given!r}; allowed: {allowed}")
    return found


def _words(given: str | Sequence[str | Shape]) -> list[str]:
    allowed = 'text such as "8x64,2x3x4x5", or a sequence of text and tuples such as [(8, 64), (2, 3, 4, 5)]'
    found = items("--shapes", given, (str, tuple, list), allowed)
    words = [word.strip().lower() if isinstance(word, str) else written(word) for word in found]
    if not words:
        raise ValueError(f"--shapes: got nothing; allowed: {allowed}")
    return words


def names_in(given: str | Sequence[str | Shape]) -> bool:
    """Whether a list of shapes names a set."""
    return any(word in NAMES for word in _words(given))


def parse(given: str | Sequence[str | Shape], batch: int | None = None) -> tuple[Shape, ...]:
    """The distinct shapes of a list of names and sizes, in its order. Text has commas between them."""
    return tuple(dict.fromkeys(shape for word in _words(given) for shape in _one(word, batch)))


def written(shape: Shape) -> str:
    """A shape as --shapes takes it, such as 32x64x56x56."""
    return "x".join(map(str, shape))
