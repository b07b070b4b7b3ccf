"""A mixture of pictures as platforms get them: small ones, screens' and a camera's, a third each."""

from __future__ import annotations

from benchmarks import decode

MIXED = "JPEGs of 0.26, 2 and 12 megapixels, a third each (64 KiB, 409 KiB, 2.1 MiB)"
_SIZES = ("512 px baseline", "2 MP baseline", "12 MP baseline q85")


def mixed(count: int) -> list[bytes]:
    """`count` JPEGs, unique by bytes after the end of the picture."""
    found = {name: (size, options) for name, size, options, _ in decode.KINDS}
    base = [decode.jpeg(*found[name]) for name in _SIZES]
    return [base[number % len(base)] + number.to_bytes(8, "big") for number in range(count)]
