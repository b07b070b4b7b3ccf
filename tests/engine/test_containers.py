"""The outer structure of files: found in whole ones, never an exception in broken ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import containers, tiff_tags
from tests.engine.hostile_images import encode, foreign, gif_bomb, picture, sized, tiff_file, valid


@pytest.mark.parametrize("name", valid())
def test_formats_are_told_by_their_bytes(name: str) -> None:
    assert containers.sniff(valid()[name]) == name.split()[0]


@pytest.mark.parametrize("name", foreign())
def test_foreign_formats_are_none(name: str) -> None:
    assert containers.sniff(foreign()[name]) is None


def test_jpeg_segments_reach_the_scan() -> None:
    segments = list(containers.jpeg_segments(encode(picture(), "JPEG", comment=b"hello")))
    assert segments[0].name == b"\xff\xe0"
    assert segments[-1].name == b"\xff\xda"
    comment = next(segment for segment in segments if segment.name == b"\xff\xfe")
    assert comment.start - comment.begin == 4
    assert comment.end - comment.start == 5


def test_jpeg_segments_pass_over_fill_bytes_and_stop_at_nonsense() -> None:
    filled = b"\xff\xd8\xff\xff\xff\xfe\0\5abc\xff\xda\0\2"
    assert [segment.name for segment in containers.jpeg_segments(filled)] == [b"\xff\xfe", b"\xff\xda"]
    for broken in (b"\xff\xd8\xff\xfe\0\1", b"\xff\xd8\xff\xfe\xff\xffabc", b"\xff\xd8junk", b"\xff\xd8\xff\xd9\0\2"):
        assert list(containers.jpeg_segments(broken)) == []


def test_png_chunks_end_with_iend_or_the_file() -> None:
    data = valid()["PNG rgb"]
    names = [chunk.name for chunk in containers.png_chunks(data + b"tail" * 9)]
    assert names[0] == b"IHDR"
    assert names[-1] == b"IEND"
    cut = list(containers.png_chunks(data[:60]))
    assert cut[-1].end == 60


def test_riff_chunks_are_padded() -> None:
    data = b"RIFF\0\0\0\0WEBPabcd\3\0\0\0xyz\0efgh\1\0\0\0w"
    assert [(chunk.name, data[chunk.start : chunk.end]) for chunk in containers.riff_chunks(data)] == [
        (b"abcd", b"xyz"),
        (b"efgh", b"w"),
    ]


def test_boxes_of_all_three_lengths() -> None:
    data = struct.pack(">I4s2s", 10, b"abcd", b"xy") + struct.pack(">I4sQ1s", 1, b"efgh", 17, b"z") + b"\0\0\0\0ijklrest"
    assert [(box.name, data[box.start : box.end]) for box in containers.boxes(data)] == [
        (b"abcd", b"xy"),
        (b"efgh", b"z"),
        (b"ijkl", b"rest"),
    ]
    assert list(containers.boxes(b"\0\0\0\7abcd")) == [], "shorter than its own header"


def test_frames_of_a_gif_are_counted_and_measured() -> None:
    assert containers.gif_frames(valid()["GIF animated"]) == (6, 96, 64)
    assert containers.gif_frames(gif_bomb(1234, 9, 8)) == (1234, 9, 8)
    grown = b"GIF89a\x02\0\x02\0\0\0\0," + struct.pack("<4H", 100, 200, 5, 6) + b"\0\x02\x02\x44\x01\0;"
    assert containers.gif_frames(grown) == (1, 105, 206)


@pytest.mark.parametrize("name", ["WEBP lossy", "WEBP lossless", "WEBP animated"])
def test_canvas_of_webp(name: str) -> None:
    assert containers.webp_canvas(valid()[name]) == (96, 64)
    assert containers.webp_canvas(sized("WEBP", 12345, 7)) == (12345, 7)
    assert containers.webp_canvas(b"RIFF\0\0\0\0WEBPwhat") is None


def test_frames_of_an_apng_whose_chunks_are_in_order() -> None:
    data = valid()["PNG animated"]
    assert containers.apng_frames(data, containers.png_chunks(data)) == 6
    still = valid()["PNG rgb"]
    assert containers.apng_frames(still, containers.png_chunks(still)) == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.sampled_from([b"", *(data[:24] for data in valid().values())]))
def test_noise_raises_nothing_and_stays_within_the_file(noise: bytes, head: bytes) -> None:
    data = head + noise
    containers.sniff(data)
    containers.webp_canvas(data)
    containers.gif_frames(data)
    containers.apng_frames(data, containers.png_chunks(data))
    tiff_tags.orientation(data)
    list(tiff_tags.directories(data, frozenset(range(0xFFFF)), 50))
    for walk in (containers.jpeg_segments, containers.png_chunks, containers.riff_chunks, containers.boxes):
        for part in walk(data):
            assert 0 <= part.begin < part.start
            assert part.end <= len(data)


# Tags of TIFF and EXIF


@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_in_both_byte_orders(order: str) -> None:
    data = tiff_file({274: (3, 1, 6), 256: (4, 1, 70_000)}, order=order)
    assert tiff_tags.read(data, frozenset({274, 256})) == {274: b"\6\0", 256: b"\x70\x11\1\0"}
    assert tiff_tags.orientation(data) == 6
    assert tiff_tags.orientation(b"Exif\0\0" + data) == 6


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_make_no_sense_are_upright(value: int) -> None:
    assert tiff_tags.orientation(tiff_file({274: (3, 1, value)})) == 1


def test_the_exif_directory_is_read_and_may_point_at_the_first() -> None:
    inner = tiff_file({0x8769: (4, 1, 26)}, {0x9286: (7, 3, 0x636261)})
    assert tiff_tags.read(inner, frozenset({0x9286})) == {0x9286: b"abc"}
    assert tiff_tags.read(tiff_file({0x8769: (4, 1, 8), 305: (2, 2, 0x41)}), frozenset({305})) == {305: b"A\0"}


def test_chains_end_where_they_loop_or_run_long() -> None:
    assert len(list(tiff_tags.directories(tiff_file({}, {}, {}, following=[14, 20, 8]), frozenset(), 100))) == 3
    assert len(list(tiff_tags.directories(tiff_file(*[{}] * 500), frozenset(), 100))) == 100
    crowd = tiff_file(*[dict.fromkeys(range(4000), (3, 1, 1))] * 40)
    assert len(list(tiff_tags.directories(crowd, frozenset(), 100))) == 25, "100,000 tags in all"


def test_big_tiff() -> None:
    data = b"II\x2b\0\x08\0\0\0" + struct.pack("<QQHHQQQ", 16, 1, 274, 3, 1, 8, 0)
    assert tiff_tags.orientation(data) == 8
