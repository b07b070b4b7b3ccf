"""What the cache keeps of one image, and its bytes: versioned, checksummed, and believed only when everything is in order."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from engine.heads import HEADS
from worker.items import ImageInfo, Scores

VERSION = b"1"
MAX_VALUE_BYTES = 64 * 1024
"""Larger values are neither written nor read; a usual one has about 200 bytes."""
_HEADS = set(HEADS)
PROVENANCE_FIELDS = frozenset({"c2pa", "digital_source_type", "generator_metadata"})


class EntryError(ValueError):
    """These bytes are no entry for this key."""


@dataclass(frozen=True, slots=True)
class CachedScore:
    """Scores of one image by one model, and what a verdict says about the image besides; enough to skip fetching's successors.

    `scope`: what the scores depend on beside the image (the engine's `cache_scope` and the limit on frames).
    """

    scope: str
    sha256: str
    scores: Scores
    width: int
    height: int
    format: str
    frames: int
    provenance: dict[str, Any]

    @classmethod
    def of(cls, scope: str, info: ImageInfo, scores: Scores) -> CachedScore:
        """The entry for an image that was just scored."""
        return cls(scope, info.sha256, scores, info.width, info.height, info.format, info.frames, info.provenance)

    def info(self) -> ImageInfo:
        """What the verdict says about the image."""
        return ImageInfo(self.sha256, self.width, self.height, self.format, self.frames, self.provenance)


def encode(entry: CachedScore, key: bytes) -> bytes:
    """`1:CRC32:JSON`; the checksum covers the key too, so that a value under a wrong key is not believed.

    Raises:
        EntryError: it would not be read back: too large, or text that is no UTF-8.
    """
    scores = entry.scores
    parts = [scores.heads, scores.crops, entry.width, entry.height, entry.format, entry.frames, entry.provenance]
    try:
        body = to_json(parts)
    except ValueError as error:
        raise EntryError("not to be written as JSON") from error
    if len(body) > MAX_VALUE_BYTES // 2:
        raise EntryError("too large")
    return b"%s:%08x:%s" % (VERSION, zlib.crc32(key + body), body)


def decode(value: bytes, key: bytes, scope: str, sha256: str) -> CachedScore:
    """The entry that `encode` wrote under this key.

    Raises:
        EntryError: anything else, whatever it is.
    """
    head, body = value[:11], value[11:]
    if len(value) > MAX_VALUE_BYTES or head != b"%s:%08x:" % (VERSION, zlib.crc32(key + body)):
        raise EntryError("not an entry of this version and key")
    try:
        heads, crops, width, height, form, frames, provenance = from_json(body, allow_inf_nan=False)
    except (ValueError, TypeError) as error:
        raise EntryError("not seven JSON values") from error
    sizes_are_right = all(type(size) is int and size >= 1 for size in (width, height, frames))
    if not (sizes_are_right and isinstance(form, str) and 1 <= len(form) <= 32):
        raise EntryError("not an image's description")
    if not isinstance(provenance, dict) or not provenance.keys() <= PROVENANCE_FIELDS:
        raise EntryError("not provenance")
    return CachedScore(scope, sha256, _scores(heads, crops), width, height, form, frames, provenance)


def _scores(heads: object, crops: object) -> Scores:
    if not isinstance(heads, dict) or heads.keys() != _HEADS or not all(map(_is_probability, heads.values())):
        raise EntryError("not scores by head")
    if not isinstance(crops, list) or not crops or not all(map(_is_probability, crops)):
        raise EntryError("not scores by crop")
    return Scores(heads={name: float(score) for name, score in heads.items()}, crops=tuple(float(score) for score in crops))


def _is_probability(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1  # a NaN is never between
