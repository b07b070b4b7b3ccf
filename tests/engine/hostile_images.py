"""Images made on the spot: a valid one of every kind, and the ways in which files lie, break and explode. Deterministic."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pillow_heif


def picture(width: int = 96, height: int = 64, mode: str = "RGB", seed: int = 1) -> PIL.Image.Image:
    """Smooth colours with some noise, in any mode that Pillow converts to."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 4), dtype=np.uint8), "RGBA").resize((width, height))
    noisy = np.clip(np.asarray(coarse).astype(int) + rng.integers(-6, 7, (height, width, 4)), 0, 255).astype(np.uint8)
    rgba = PIL.Image.fromarray(noisy, "RGBA")
    return rgba if mode == "RGBA" else rgba.convert("RGB") if mode == "RGB" else rgba.convert("RGB").convert(mode)


def encode(image: PIL.Image.Image, name: str, **options: Any) -> bytes:
    """The image as a file; `name` is Pillow's, or HEIF."""
    out = io.BytesIO()
    if name == "HEIF":
        more = options.pop("append_images", [])
        file = pillow_heif.from_pillow(image)
        for other in more:
            file.add_from_pillow(other)
        file.save(out, **options)
    else:
        image.save(out, name, **options)
    return out.getvalue()


def frames(count: int, width: int = 96, height: int = 64) -> list[PIL.Image.Image]:
    """Frames of one colour each, told apart by their red."""
    return [PIL.Image.new("RGB", (width, height), (min(255, index * 20), 128, 64)) for index in range(count)]


@cache
def valid() -> dict[str, bytes]:
    """A small valid file of every kind, by name; the name begins with the format."""
    plain, several = picture(), frames(6)
    animated = {"save_all": True, "append_images": several[1:], "duration": 50}
    return {
        "JPEG baseline": encode(plain, "JPEG"),
        "JPEG progressive": encode(plain, "JPEG", progressive=True),
        "JPEG grey": encode(plain.convert("L"), "JPEG"),
        "JPEG cmyk": encode(plain.convert("CMYK"), "JPEG"),
        "PNG rgb": encode(plain, "PNG"),
        "PNG rgba": encode(picture(mode="RGBA"), "PNG"),
        "PNG palette": encode(plain.quantize(16), "PNG"),
        "PNG animated": encode(several[0], "PNG", **animated),
        "WEBP lossy": encode(plain, "WEBP"),
        "WEBP lossless": encode(picture(mode="RGBA"), "WEBP", lossless=True),
        "WEBP animated": encode(several[0], "WEBP", **animated),
        "GIF still": encode(plain, "GIF"),
        "GIF animated": encode(several[0], "GIF", **animated),
        "BMP rgb": encode(plain, "BMP"),
        "BMP palette": encode(plain.quantize(16), "BMP"),
        "TIFF raw": encode(plain, "TIFF"),
        "TIFF lzw": encode(plain, "TIFF", compression="tiff_lzw"),
        "TIFF jpeg": encode(plain, "TIFF", compression="jpeg"),
        "TIFF pages": encode(several[0], "TIFF", save_all=True, append_images=several[1:], compression="tiff_deflate"),
        "AVIF still": encode(plain, "AVIF", speed=10),
        "AVIF sequence": encode(several[0], "AVIF", speed=10, **animated),
        "HEIC still": encode(plain, "HEIF", quality=60),
        "HEIC pictures": encode(several[0], "HEIF", append_images=several[1:3], quality=60),
    }


def png_chunk(name: bytes, payload: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png_file(width: int, height: int, *middle: bytes, depth: int = 8, colour: int = 2, pixels: bytes | None = None) -> bytes:
    """A PNG out of chunks; without `pixels` its IDAT is empty."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"") if pixels is None else pixels)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(middle) + data + png_chunk(b"IEND", b"")


def tiff_file(*directories: dict[int, tuple[int, int, int]], order: str = "<", following: list[int] | None = None) -> bytes:
    """A TIFF whose directories lie behind one another; tags are (type, count, value or offset)."""
    out = bytearray((b"II\x2a\x00" if order == "<" else b"MM\x00\x2a") + struct.pack(order + "I", 8))
    for number, tags in enumerate(directories):
        at = len(out)
        end = at + 2 + 12 * len(tags) + 4
        out += struct.pack(order + "H", len(tags))
        for tag, (kind, count, value) in sorted(tags.items()):
            shift = 16 if order == ">" and kind == 3 else 0
            out += struct.pack(order + "HHII", tag, kind, count, value << shift)
        last = number + 1 == len(directories)
        out += struct.pack(order + "I", following[number] if following else 0 if last else end)
    return bytes(out)


def sized(name: str, width: int, height: int) -> bytes:
    """A file whose header claims this size, with little or nothing behind it."""
    match name:
        case "JPEG":
            data = bytearray(valid()["JPEG baseline"])
            struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height & 0xFFFF, width & 0xFFFF)
            return bytes(data)
        case "PNG":
            return png_file(width, height)
        case "GIF":
            data = bytearray(valid()["GIF still"])
            struct.pack_into("<HH", data, 6, width & 0xFFFF, height & 0xFFFF)
            return bytes(data)
        case "BMP":
            data = bytearray(valid()["BMP rgb"])
            struct.pack_into("<ii", data, 18, width, height)
            return bytes(data)
        case "TIFF":
            tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
            return tiff_file(tags | {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 4)})
        case "WEBP":
            canvas = (width - 1 & 0xFFFFFF).to_bytes(3, "little") + (height - 1 & 0xFFFFFF).to_bytes(3, "little")
            chunks = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + valid()["WEBP lossy"][12:]
            return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
        case "AVIF" | "HEIC":
            data = bytearray(valid()[f"{name} still"])
            struct.pack_into(">II", data, data.index(b"ispe") + 8, width, height)
            return bytes(data)
    raise ValueError(name)


def gif_bomb(count: int, width: int = 16, height: int = 16) -> bytes:
    """A GIF of many frames of twelve bytes each."""
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<4H", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    return screen + frame * count + b";"


def zipped_png(width: int, height: int) -> bytes:
    """A black PNG: megapixels in kilobytes. Its stream is one flushed block over and over, as deflating it would take long."""
    size = height * (1 + width * 3)
    blocks, rest = divmod(size, 1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = packer.compress(bytes(rest)) + packer.flush()
    checksum = (size % 65521) << 16 | 1
    return png_file(width, height, pixels=b"\x78\x9c" + block * blocks + last + struct.pack(">I", checksum))


@cache
def text_bombs() -> dict[str, bytes]:
    """Metadata that explodes, loops or lies, around valid pixels: all of these are images that viewers show."""
    png, jpeg = valid()["PNG rgb"], valid()["JPEG baseline"]
    bomb = zlib.compress(bytes(64 << 20), 9)
    head, rest = png[:33], png[33:]
    looping = tiff_file({0x8769: (4, 1, 8), 0x0112: (3, 1, 1)}, following=[8])
    segment = lambda marker, payload: bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload  # noqa: E731
    return {
        "PNG zTXt bomb": head + png_chunk(b"zTXt", b"Comment\0\0" + bomb) + rest,
        "PNG iTXt bomb": head + png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb) + rest,
        "PNG iCCP bomb": head + png_chunk(b"iCCP", b"icc\0\0" + bomb) + rest,
        "PNG many tEXt": head + png_chunk(b"tEXt", b"a\0b") * 50_000 + rest,
        "PNG bad text CRC": head + b"\0\0\0\3tEXta\0b\0\0\0\0" + rest,
        "PNG looping eXIf": head + png_chunk(b"eXIf", looping) + rest,
        "JPEG looping EXIF": jpeg[:2] + segment(0xE1, b"Exif\0\0" + looping) + jpeg[2:],
        "JPEG huge EXIF": jpeg[:2] + segment(0xE1, b"Exif\0\0" + b"II*\0\x08\0\0\0\xff\xff" + bytes(65000)) * 100 + jpeg[2:],
        "JPEG broken MPF": jpeg[:2] + segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff") + jpeg[2:],
        "JPEG broken Photoshop": jpeg[:2] + segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed" + b"\xff" * 40) + jpeg[2:],
        "JPEG many comments": jpeg[:2] + segment(0xFE, b"x") * 100_000 + jpeg[2:],
    }


@cache
def foreign() -> dict[str, bytes]:
    """Formats that are none of ours, most of which Pillow would open if it were let."""
    plain = picture(32, 32)
    others = {name: encode(plain, name) for name in ("PPM", "TGA", "PCX", "ICNS", "ICO", "DDS", "EPS", "PDF", "JPEG2000", "SGI")}
    return others | {
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(64),
        "FITS": b"SIMPLE  =                    T" + b" " * 3000,
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(100),
        "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "HTML": b"<!doctype html><title>404</title>",
        "ZIP": b"PK\3\4" + bytes(60),
        "MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(60),
        "BM text": b"BM is how this sentence begins, and it is no bitmap at all.",
        "JXL": b"\xff\x0a" + bytes(40),
        "RIFF wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(4096),
    }


def corpus(count: int, seed: int = 7) -> Iterator[tuple[str, bytes]]:
    """`count` hostile files of every kind, round and round."""
    rng = np.random.default_rng(seed)
    files = list(valid().items())
    special = [
        *foreign().items(),
        *text_bombs().items(),
        ("GIF bomb", gif_bomb(20_000)),
        ("PNG zip bomb", zipped_png(20_000, 20_000)),
    ]
    special += [(f"{name} {size}", sized(name, *size)) for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIC")
                for size in ((60_000, 60_000), (0, 0), (1, 60_000))]  # fmt: skip
    for number in range(count):
        name, data = files[int(rng.integers(len(files)))]
        match number % 5:
            case 0 if number // 5 < len(special):
                yield special[number // 5]
            case 0 | 1:
                cut = int(rng.integers(1, len(data)))
                yield f"{name} cut at {cut}", data[:cut]
            case 2:
                yield f"{name} flipped", flipped(data, rng, int(rng.integers(1, 8)))
            case 3:
                head = flipped(data[:200], rng, 3)
                yield f"{name} head flipped", head + data[200:]
            case 4:
                at = int(rng.integers(len(data)))
                yield f"{name} with noise", data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def flipped(data: bytes, rng: np.random.Generator, bits: int) -> bytes:
    """The bytes with some bits turned."""
    out = bytearray(data)
    for at in rng.integers(0, len(out) * 8, bits):
        out[int(at) // 8] ^= 1 << (int(at) % 8)
    return bytes(out)
