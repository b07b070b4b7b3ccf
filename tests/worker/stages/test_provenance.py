"""Marks of generators: found where real tools put them, null where there are none, bounded whatever the file holds."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo

from tests.engine import hostile_images
from tests.engine.hostile_images import encode, picture, png_chunk
from worker.stages import provenance

NOTHING = {"c2pa": None, "digital_source_type": None, "generator_metadata": None}
URI = "http://cv.iptc.org/newscodes/digitalsourcetype/"
A1111 = "a castle, oil on canvas\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"


def jpeg_segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(*segments: bytes) -> bytes:
    data = encode(picture(), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def with_png_chunks(*chunks: bytes) -> bytes:
    data = encode(picture(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def with_webp_chunk(name: bytes, payload: bytes) -> bytes:
    body = encode(picture(), "WEBP")[8:] + name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) & 1)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def box(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload) + 8) + name + payload


def cbor_text(text: str) -> bytes:
    raw = text.encode()
    return (bytes((0x60 + len(raw),)) if len(raw) < 24 else bytes((0x78, len(raw)))) + raw


def manifest(claim: bytes = b"", padding: int = 0) -> bytes:
    """A C2PA store as c2pa-rs lays it out: a superbox of kind `c2pa`, in it a manifest, in it assertions and the claim."""
    kind = b"c2pa" + bytes.fromhex("00110010800000aa00389b71") + b"\x03c2pa\0"
    content = box(b"jumb", box(b"jumd", b"c2ma" + bytes(12) + b"\x03urn:uuid:x\0") + box(b"cbor", bytes(padding) + claim))
    return box(b"jumb", box(b"jumd", kind) + content)


def claim(generator: str = "Some_Editor/1.0 c2pa-rs/0.31", source_type: str = "trainedAlgorithmicMedia") -> bytes:
    action = cbor_text("digitalSourceType") + cbor_text(URI + source_type) + cbor_text("action")
    return action + cbor_text("claim_generator") + cbor_text(generator) + cbor_text("signature")


def app11(store: bytes, size: int = 60_000) -> list[bytes]:
    """A store in APP11 segments; from the second on the header of the box is repeated."""
    parts = [store[at : at + size] for at in range(0, len(store), size)]
    return [
        jpeg_segment(0xEB, b"JP\0\1" + struct.pack(">I", number) + (b"" if number == 1 else store[:8]) + part)
        for number, part in enumerate(parts, 1)
    ]


def in_blocks(payload: bytes) -> bytes:
    """GIF's blocks of at most 255 bytes and their terminator."""
    parts = [payload[at : at + 255] for at in range(0, len(payload), 255)]
    return b"".join(bytes((len(part),)) + part for part in parts) + b"\0"


def xmp(inner: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f'xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" {inner}</rdf:RDF></x:xmpmeta>' + " " * 500 + '<?xpacket end="w"?>'
    ).encode()


ATTRIBUTE = xmp(f'Iptc4xmpExt:DigitalSourceType="{URI}trainedAlgorithmicMedia"/>')


@pytest.mark.parametrize("name", hostile_images.valid())
def test_plain_images_have_no_marks(name: str) -> None:
    assert provenance.find(hostile_images.valid()[name]) == NOTHING


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"not an image", bytes(100)])
def test_what_is_no_image_has_no_marks(data: bytes) -> None:
    assert provenance.find(data) == NOTHING


OTHER_BOX = jpeg_segment(0xEB, b"JP\0\7\0\0\0\1" + box(b"jumb", bytes(40)))
C2PA_FILES = {
    "JPEG": with_segments(*app11(manifest(claim()))),
    "JPEG in parts": with_segments(*app11(manifest(claim(), padding=200_000))),
    "JPEG after another box": with_segments(OTHER_BOX, *app11(manifest(claim()))),
    "PNG": with_png_chunks(png_chunk(b"caBX", manifest(claim()))),
    "WebP": with_webp_chunk(b"C2PA", manifest(claim())),
    "AVIF": hostile_images.valid()["AVIF still"]
    + box(b"uuid", bytes.fromhex("d8fec3d61b0e483c92975828877ec481") + bytes(4) + b"manifest\0" + bytes(8) + manifest(claim())),
    "GIF": encode(picture(), "GIF")[:-1]
    + b"\x21\xff\x0bC2PA_GIF\1\0\0"
    + in_blocks(manifest(claim()))
    + b";",
}  # fmt: skip


@pytest.mark.parametrize("container", C2PA_FILES)
def test_c2pa_manifest_with_its_generator_and_source_type(container: str) -> None:
    assert provenance.find(C2PA_FILES[container]) == {
        "c2pa": "Some_Editor/1.0 c2pa-rs/0.31",
        "digital_source_type": "trainedAlgorithmicMedia",
        "generator_metadata": None,
    }


def test_c2pa_in_tiff() -> None:
    out = io.BytesIO()
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0xCD41] = 7
    tags[0xCD41] = manifest(claim())
    picture().save(out, "TIFF", tiffinfo=tags)
    assert provenance.find(out.getvalue())["c2pa"] == "Some_Editor/1.0 c2pa-rs/0.31"


def test_c2pa_second_version_names_its_generator_in_a_map() -> None:
    info = cbor_text("claim_generator_info") + b"\xa1" + cbor_text("name") + cbor_text("Image Maker") + cbor_text("zzz")
    assert provenance.find(with_segments(*app11(manifest(info))))["c2pa"] == "Image Maker"


def test_c2pa_without_a_readable_claim_is_present() -> None:
    assert provenance.find(with_segments(*app11(manifest())))["c2pa"] == "present"
    huge = cbor_text("claim_generator") + b"\x7a\xff\xff\xff\xff" + b"A" * 100_000
    found = provenance.find(with_png_chunks(png_chunk(b"caBX", manifest(huge))))["c2pa"]
    assert found == "A" * 200


def test_a_jumbf_box_of_another_kind_is_no_manifest() -> None:
    other = box(b"jumb", box(b"jumd", b"json" + bytes(12) + b"\x03x\0") + box(b"json", b'{"claim_generator": "x"}'))
    assert provenance.find(with_segments(*app11(other))) == NOTHING


@pytest.mark.parametrize(
    ("inner", "term"),
    [
        (f'Iptc4xmpExt:DigitalSourceType="{URI}trainedAlgorithmicMedia"/>', "trainedAlgorithmicMedia"),
        (f'Iptc4xmpExt:DigitalSourceType="{URI}compositeWithTrainedAlgorithmicMedia"/>', "compositeWithTrainedAlgorithmicMedia"),
        ('Iptc4xmpExt:DigitalSourceType="trainedAlgorithmicMedia"/>', "trainedAlgorithmicMedia"),
        (
            f"><Iptc4xmpExt:DigitalSourceType>{URI}digitalCapture\n</Iptc4xmpExt:DigitalSourceType></rdf:Description>",
            "digitalCapture",
        ),
        (f'><Iptc4xmpExt:DigitalSourceType rdf:resource="{URI}algorithmicMedia"/></rdf:Description>', "algorithmicMedia"),
        ('Iptc4xmpExt:DigitalSourceType="someFutureTerm"/>', "someFutureTerm"),
        ('Iptc4xmpExt:DigitalSourceType="not a term, but a story"/>', None),
        ('Iptc4xmpExt:DigitalSourceType=""/>', None),
    ],
)  # fmt: skip
def test_digital_source_type_in_xmp(inner: str, term: str | None) -> None:
    data = with_segments(jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(inner)))
    assert provenance.find(data)["digital_source_type"] == term


def test_the_strongest_source_type_is_told() -> None:
    """An edited photograph keeps its ingredient's type beside its own."""
    both = claim(source_type="digitalCapture") + claim(source_type="compositeWithTrainedAlgorithmicMedia")
    assert provenance.find(with_segments(*app11(manifest(both))))["digital_source_type"] == "compositeWithTrainedAlgorithmicMedia"


@pytest.mark.parametrize(
    "data",
    [
        with_png_chunks(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + ATTRIBUTE)),
        with_png_chunks(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(ATTRIBUTE))),
        with_webp_chunk(b"XMP ", ATTRIBUTE),
        encode(picture(), "TIFF", tiffinfo={700: ATTRIBUTE}),
        encode(picture(), "AVIF", speed=10, xmp=ATTRIBUTE),
        encode(picture(), "HEIF", xmp=ATTRIBUTE),
        encode(picture(), "GIF")[:-1] + b"\x21\xff\x0bXMP DataXMP" + ATTRIBUTE + b"\1" + bytes(range(255, -1, -1)) + b"\0;",
    ],
    ids=["PNG", "PNG packed", "WebP", "TIFF", "AVIF", "HEIC", "GIF"],
)
def test_xmp_in_every_container(data: bytes) -> None:
    assert provenance.find(data)["digital_source_type"] == "trainedAlgorithmicMedia"


@pytest.mark.parametrize(
    "packet",
    [
        b"<x:xmpmeta",
        b"<a>" * 100_000,
        b'<!DOCTYPE a [<!ENTITY b "c">]><a DigitalSourceType="trainedAlgorithmicMedia">&b;</a>',
        b'<?xml version="1.0" encoding="klingon"?><a/>',
        b"\xff\xfe\0\0",
        b"\0" * 1000,
    ],
)
def test_broken_xmp_tells_nothing(packet: bytes) -> None:
    assert provenance.find(with_webp_chunk(b"XMP ", packet)) == NOTHING


def png_text(key: str, value: str, packed: bool = False) -> bytes:
    info = PngInfo()
    info.add_text(key, value, packed)
    return encode(picture(), "PNG", pnginfo=info)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", [A1111, "ein Schloß, 城"])
def test_parameters_of_stable_diffusion_web_ui(text: str, packed: bool) -> None:
    found = provenance.find(png_text("parameters", text, packed))["generator_metadata"]
    assert found == f"PNG parameters: {' '.join(text.split())}"[:200]


@pytest.mark.parametrize("key", ["prompt", "workflow", "invokeai_metadata", "fooocus_scheme"])
def test_keys_that_only_generators_write(key: str) -> None:
    value = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 5}}})
    assert provenance.find(png_text(key, value))["generator_metadata"] == f"PNG {key}: {value}"


@pytest.mark.parametrize(
    ("key", "value"), [("Software", "NovelAI"), ("Software", "Adobe Firefly"), ("Source", "Stable Diffusion XL 7BCCAA2C")]
)
def test_png_fields_that_name_a_generator(key: str, value: str) -> None:
    assert provenance.find(png_text(key, value))["generator_metadata"] == f"PNG {key}: {value}"


def exif(tags: dict[int, object], inner: dict[int, object] | None = None) -> bytes:
    block = PIL.Image.Exif()
    block.update(tags)
    if inner:
        block.get_ifd(0x8769).update(inner)
    return block.tobytes()


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF"])
def test_exif_software_in_every_container(container: str) -> None:
    data = encode(picture(), container, exif=exif({0x0131: "Midjourney 6.1"}))
    assert provenance.find(data)["generator_metadata"] == "EXIF Software: Midjourney 6.1"


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_parameters_in_a_user_comment(order: str) -> None:
    data = encode(picture(), "JPEG", exif=exif({}, {0x9286: b"UNICODE\0" + A1111.encode(order)}))
    found = provenance.find(data)["generator_metadata"]
    assert found is not None
    assert found.startswith("EXIF UserComment: a castle, oil on canvas Negative prompt: blurry Steps: 20")


def test_comfyui_in_webp() -> None:
    data = encode(picture(), "WEBP", exif=exif({0x010F: 'workflow:{"nodes": []}'}))
    assert provenance.find(data)["generator_metadata"] == 'EXIF Make: workflow:{"nodes": []}'


@pytest.mark.parametrize("name", ["xmp:CreatorTool", "photoshop:Credit"])
def test_xmp_fields_that_name_a_generator(name: str) -> None:
    data = with_webp_chunk(b"XMP ", xmp(f'{name}="Made with Google AI"/>'))
    assert provenance.find(data)["generator_metadata"] == f"XMP {name.partition(':')[2]}: Made with Google AI"


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x0131, "Adobe Photoshop 25.0 (Windows)"),
        (0x0131, "Editor de imagen 3"),
        (0x010F, "Canon"),
        (0x0110, "Gemini 2000"),
        (0x010E, "Gemini, Aurora and Luma over the ideal village"),
        (0x010E, "A review of Midjourney and DALL-E 3, photographed at the fair"),
        (0x010E, "Steps: 20 to the church, then left"),
    ],
)
def test_the_innocent_are_not_accused(tag: int, text: str) -> None:
    assert provenance.find(encode(picture(), "JPEG", exif=exif({tag: text}))) == NOTHING


def test_strings_are_printable_and_short() -> None:
    found = provenance.find(png_text("parameters", "a\x1b[31m\n\u202eb\x07" + "c" * 10_000))["generator_metadata"]
    assert found is not None
    assert len(found) == 200
    assert found.isprintable()
    assert provenance.bounded({"c2pa": "x\n" * 500, "digital_source_type": 3, "evil": 1}) == NOTHING | {"c2pa": ("x " * 100)}
    assert provenance.bounded("nonsense") == NOTHING


@pytest.mark.parametrize("name", hostile_images.text_bombs())
def test_bombs_cost_little(name: str) -> None:
    data = hostile_images.text_bombs()[name]
    started = time.process_time()
    provenance.find(data)
    assert time.process_time() - started < 3


def test_many_packed_texts_cost_little() -> None:
    bomb = zlib.compress(bytes(1 << 20), 9)
    chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb) + png_chunk(b"zTXt", b"a\0\0" + bomb)
    data = with_png_chunks(chunk * 2000)
    started = time.process_time()
    provenance.find(data)
    assert time.process_time() - started < 5


def test_slow_patterns_cost_little() -> None:
    data = with_png_chunks(*[png_chunk(b"tEXt", b"a\0" + b"Steps: 1, " * 6000)] * 100)
    started = time.process_time()
    provenance.find(data)
    assert time.process_time() - started < 5


SEEDS = [
    *C2PA_FILES.values(),
    png_text("parameters", A1111, True),
    encode(picture(), "JPEG", exif=exif({0x0131: "Midjourney"}, {0x9286: b"UNICODE\0" + A1111.encode("utf-16-le")})),
    with_webp_chunk(b"XMP ", ATTRIBUTE),
    encode(picture(), "TIFF", tiffinfo={700: ATTRIBUTE, 305: "Midjourney"}),
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 5000))
def test_mutated_files_never_raise_and_stay_bounded(data: bytes, seed: int, bits: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    head = hostile_images.flipped(data[:2000], rng, bits) + data[2000:]
    for mutated in (head, head[:cut]):
        found = provenance.find(mutated)
        assert set(found) == set(NOTHING)
        assert all(value is None or (value and len(value) <= 200 and value.isprintable()) for value in found.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.sampled_from([data[:14] for data in SEEDS]))
def test_noise_behind_a_magic_never_raises(noise: bytes, magic: bytes) -> None:
    provenance.find(magic + noise)
