"""What the cache keeps comes back unchanged, and nothing else is ever believed."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.items import ImageInfo, Scores
from worker.stages.cache_entry import VERSION, CachedScore, EntryError, decode, encode

SCORES = Scores(heads={"linear": 0.973, "knn": 0.1 + 0.2, "ocsvm": 1.0}, crops=(0.9, 0.0))
INFO = ImageInfo("ab" * 32, 1024, 768, "JPEG", 2, {"c2pa": {"a": ["ü", None]}, "digital_source_type": None})
ENTRY = CachedScore.of("scope", INFO, SCORES)
KEY = b"key"

probabilities = st.floats(0, 1)
scores = st.builds(
    Scores,
    heads=st.fixed_dictionaries({"linear": probabilities, "knn": probabilities, "ocsvm": probabilities}),
    crops=st.lists(probabilities, min_size=1, max_size=5).map(tuple),
)
sizes = st.integers(1, 10**6)


@given(scores, sizes, sizes, sizes)
def test_round_trip(given_scores: Scores, width: int, height: int, frames: int) -> None:
    info = ImageInfo("cd" * 32, width, height, "WEBP", frames, {"generator_metadata": "x"})
    entry = CachedScore.of("s", info, given_scores)
    read = decode(encode(entry, KEY), KEY, "s", "cd" * 32)
    assert read == entry
    assert (read.info(), read.scores) == (info, given_scores)


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    value = encode(ENTRY, KEY)
    for position in range(len(value)):
        for bit in range(8):
            damaged = bytearray(value)
            damaged[position] ^= 1 << bit
            with pytest.raises(EntryError):
                decode(bytes(damaged), KEY, "scope", INFO.sha256)
        with pytest.raises(EntryError):
            decode(value[:position], KEY, "scope", INFO.sha256)


def test_a_value_under_another_key_is_not_believed() -> None:
    with pytest.raises(EntryError):
        decode(encode(ENTRY, KEY), b"other", "scope", INFO.sha256)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b'"1234567"',
        b"[1, 2, 3, 4, 5, 6, 7]",
        b'[{"linear": 0.5}, [0.5], 1, 1, "PNG", 1, {}]',
        b'[{"linear": 1.5, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {}]',
        b'[{"linear": -0.1, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {}]',
        b'[{"linear": true, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {}]',
        b'[{"linear": NaN, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {}]',
        b'[{"linear": "0.5", "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [], 1, 1, "PNG", 1, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [2], 1, 1, "PNG", 1, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 0, 1, "PNG", 1, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 1.0, 1, "PNG", 1, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "", 1, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", true, {}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {"label": "x"}]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, []]',
        b'[{"linear": 0.5, "knn": 0, "ocsvm": 0}, [0.5], 1, 1, "PNG", 1, {}, 8]',
    ],
)
def test_a_right_checksum_does_not_make_it_true(body: bytes) -> None:
    value = b"%s:%08x:%s" % (VERSION, zlib.crc32(KEY + body), body)
    with pytest.raises(EntryError):
        decode(value, KEY, "scope", INFO.sha256)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_entry(value: bytes) -> None:
    with pytest.raises(EntryError):
        decode(value, KEY, "scope", INFO.sha256)


@pytest.mark.parametrize("mark", ["x" * 100_000, "\ud800"])
def test_what_could_not_be_read_back_is_not_written(mark: str) -> None:
    info = ImageInfo("ab" * 32, 1, 1, "PNG", 1, {"generator_metadata": mark})
    with pytest.raises(EntryError):
        encode(CachedScore.of("s", info, SCORES), KEY)
