"""The GPU decoder on a stand-in for nvImageCodec, and on nvImageCodec itself without a GPU where 0.9 is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from engine import images, jpeg_region, preprocess
from engine.jpeg_gpu import MOST_DIFFERENCE, GpuDecoderUnavailable, GpuJpegDecoder, load_library
from tests.engine import fake_nvimgcodec
from tests.engine.test_jpeg_region import LAYOUTS, as_440, encode, picture

LIMITS = images.Limits(max_pixels=64_000_000)


@pytest.fixture(autouse=True)
def _sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_nvimgcodec, "FAULT", "")
    fake_nvimgcodec.CALLS.clear()


@pytest.fixture(scope="module")
def decoder() -> GpuJpegDecoder:
    return GpuJpegDecoder(fake_nvimgcodec)


def near(cut: jpeg_region.Cut | None, data: bytes, layout: preprocess.Layout) -> bool:
    """Whether crops and size are those of the safe decoder, but for what the stand-in is off."""
    expected = images.read_crops(data, LIMITS, layout)
    assert cut is not None
    assert (cut.width, cut.height) == (expected.width, expected.height)
    return cut.crops.shape == expected.crops.shape and int(np.abs(cut.crops.astype(int) - expected.crops).max()) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(700, 500), (224, 224), (300, 90), (1, 1), (225, 1000)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_those_of_the_safe_decoder_as_a_viewer_shows_them(
    decoder: GpuJpegDecoder, layout: preprocess.Layout, size: tuple[int, int], orientation: int
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(*size), quality=90, exif=exif.tobytes())
    assert near(decoder.read_crops(data, LIMITS, layout), data, layout)


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}, {"optimize": True}],
)
def test_kinds_that_come_this_way(decoder: GpuJpegDecoder, options: dict[str, object]) -> None:
    for data in (encode(picture(400, 320), **options), encode(picture(400, 320, mode="L"), **options)):
        assert near(decoder.read_crops(data, LIMITS), data, "center")
    data = as_440(encode(picture(320, 320), subsampling=1))
    assert decoder.read_crops(data, LIMITS) is not None


def test_only_the_regions_of_the_crops_are_asked_for_all_images_in_one_batch(decoder: GpuJpegDecoder) -> None:
    data = [encode(picture(500, 400, seed)) for seed in range(3)]
    cuts = decoder.read_many([data[0], b"no image", data[1], data[2][:-2], data[2]], LIMITS, "five")
    assert fake_nvimgcodec.CALLS == [15]
    assert [cut is not None for cut in cuts] == [True, False, True, False, True]
    assert all(near(cuts[place], data[which], "five") for which, place in enumerate((0, 2, 4)))


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(300, 300), progressive=True),
        encode(picture(300, 300).convert("CMYK")),
        encode(picture(300, 300), keep_rgb=True),
        encode(picture(300, 300)).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1),
        encode(picture(300, 300)).replace(b"\x03\x01\x22\x00", b"\x03\x01\x41\x00", 1),
        encode(picture(300, 300)).replace(b"\xff\xdb", b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00\xff\xdb", 1),
        encode(picture(300, 300))[:-2],
        encode(picture(300, 300))[:-20] + b"\xff\xd9\x00",
        encode(picture(300, 300), restart_marker_rows=1).replace(b"\xff\xd3", b"\xff\xd4", 1),
        encode(picture(300, 300), restart_marker_rows=1).replace(b"\xff\xd3", b"", 1),
        encode(picture(9000, 8000, mode="L")),
        b"\xff\xd8\xff\xd9",
        b"",
    ],
    ids=[
        "progressive",
        "CMYK",
        "RGB",
        "12 bits",
        "4:1:1",
        "Adobe RGB",
        "cut",
        "cut EOI",
        "restart",
        "lost",
        "pixels",
        "empty",
        "no",
    ],
)
def test_other_kinds_and_broken_files_are_left_to_the_safe_decoder(decoder: GpuJpegDecoder, data: bytes) -> None:
    if data.endswith(b"\xff\xd9\x00"):  # an end is there, the safe decoder has it: nothing tells this one from a whole file
        assert decoder.read_crops(data, LIMITS) is not None
        return
    assert decoder.read_crops(data, LIMITS) is None
    assert fake_nvimgcodec.CALLS == []


@pytest.mark.parametrize("fault", ["none", "raises", "device lost", "shape", "other size"])
def test_whatever_goes_wrong_with_an_image_is_left_to_the_safe_decoder(
    decoder: GpuJpegDecoder, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    data = encode(picture(400, 320))
    monkeypatch.setattr(fake_nvimgcodec, "FAULT", fault)
    assert decoder.read_many([data, data], LIMITS, "five") == [None, None]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no device", r"finds no GPU it can use \(CUDA Runtime failure: '#35'"),
        ("none", "did not decode a picture of the self-check"),
        ("raises", "did not decode a picture of the self-check"),
        ("far off", r"differs from Pillow by up to 40 levels, .* 8 and 1 are allowed"),
    ],
)
def test_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, fault: str, words: str) -> None:
    monkeypatch.setattr(fake_nvimgcodec, "FAULT", fault)
    with pytest.raises(GpuDecoderUnavailable, match=words) as refusal:
        GpuJpegDecoder(fake_nvimgcodec)
    assert len(str(refusal.value)) <= images.MAX_MESSAGE_CHARS


def test_without_the_package_it_is_named() -> None:
    try:
        import nvidia.nvimgcodec  # noqa: F401
    except ImportError:
        with pytest.raises(GpuDecoderUnavailable, match="install the extra gpu-decode"):
            load_library()


def without_a_gpu() -> Any:
    """nvImageCodec itself, whose decoder is led to its CPU backend."""
    real = pytest.importorskip("nvidia.nvimgcodec")
    if not hasattr(real, "NVIMGCODEC_DEVICE_CPU_ONLY"):
        pytest.skip("this nvImageCodec runs on a GPU only")

    def on_the_cpu(device_id: int, max_num_cpu_threads: int, backends: list[Any], options: str) -> Any:
        assert backends
        cpu = [real.Backend(real.BackendKind.CPU_ONLY)]
        return real.Decoder(real.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads, cpu, options)

    names = ("BackendKind", "Backend", "DecodeParams", "ColorSpec", "CodeStream", "Region", "__version__")
    return SimpleNamespace(Decoder=on_the_cpu, **{name: getattr(real, name) for name in names})


def test_on_nvimagecodec_itself() -> None:
    """Every call as the real library takes it; its CPU backend is libjpeg-turbo, whose pixels are Pillow's."""
    decoder = GpuJpegDecoder(without_a_gpu())
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for data in (
        encode(picture(700, 500), quality=92, exif=exif.tobytes()),
        encode(picture(100, 300), subsampling=1),
        encode(picture(640, 640, mode="L"), restart_marker_rows=2),
    ):
        for layout in LAYOUTS:
            cut = decoder.read_crops(data, LIMITS, layout)
            expected = images.read_crops(data, LIMITS, layout).crops
            assert cut is not None
            assert int(np.abs(cut.crops.astype(int) - expected).max()) <= MOST_DIFFERENCE
