"""Marks that a generator left in an image file: C2PA manifest, IPTC digital source type, generator metadata.

Positive evidence only, and none of it is verified: a mark says what the file claims, and its absence says nothing, for any
upload may have been stripped. A C2PA manifest is found and named, its signature is not checked. Runs in the decoder process.

Sources: C2PA 2.2 (embedding in JPEG, PNG, WebP, TIFF, GIF, ISO media); IPTC NewsCodes `digitalsourcetype`; XMP; EXIF 2.32;
what Stable Diffusion web UI, ComfyUI, InvokeAI, NovelAI and others write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine import tiff_tags
from worker.stages import metadata
from worker.stages.metadata import MAX_XMP_BYTES, Metadata

MAX_CHARS = 200
FIELDS = ("c2pa", "digital_source_type", "generator_metadata")

_MAX_SEARCHED_CHARS = 1 << 13
_EXIF_NAMES = {
    0x0131: "Software",
    0x010F: "Make",
    0x0110: "Model",
    0x013B: "Artist",
    0x010E: "ImageDescription",
    0x9286: "UserComment",
}
_XMP_NAMES = ("CreatorTool", "Credit", "Software")

_SOURCE_TYPES = (  # the first found in this order is reported: the strongest claim first
    "trainedAlgorithmicMedia",
    "compositeWithTrainedAlgorithmicMedia",
    "compositeSynthetic",
    "algorithmicMedia",
    "trainedAlgorithmicData",
    "algorithmicallyEnhanced",
    "dataDrivenMedia",
    "digitalCreation",
    "digitalArt",
    "softwareImage",
    "virtualRecording",
    "composite",
    "compositeCapture",
    "screenCapture",
    "humanEdits",
    "minorHumanEdits",
    "computationalCapture",
    "multiFrameComputationalCapture",
    "digitalCapture",
    "negativeFilm",
    "positiveFilm",
    "print",
)
# In CBOR a text is followed by whatever comes next, which may be a letter too: known terms only, the longest first.
_SOURCE_TYPE_URI = re.compile(rb"digitalsourcetype/(" + "|".join(sorted(_SOURCE_TYPES, key=len, reverse=True)).encode() + rb")")

_GENERATOR_KEYS = (
    "parameters", "prompt", "workflow", "invokeai_metadata", "invokeai_graph", "invokeai_workflow", "sd-metadata", "Dream",
    "generation_data", "fooocus_scheme", "sui_image_params",
)  # fmt: skip
# Names that mean a generator and nothing else; "imagen", "gemini" or "flux" alone would accuse the innocent.
_GENERATORS = re.compile(
    r"stable[ _-]?diffusion|automatic1111|comfyui|invokeai|fooocus|swarmui|sd\.next|novelai|midjourney|dall[ ·.-]?e[ -]?[23]|"
    r"\bdall[·-]e\b|\bopenai\b|chatgpt|gpt-image|(adobe|_)[ _]?firefly|(made|created|edited) with google ai|google gemini|"
    r"\bflux[ .]?[12]\b|black forest labs|ideogram|leonardo\.ai|recraft\.ai|dreamstudio|stability ai|nightcafe|craiyon|"
    r"bing image creator|imagined with ai|seedream|dreamina|jimeng|qwen-image|hunyuan ?image|draw things|diffusionbee|"
    r"easy diffusion|tensor\.art|civitai|sdxl",
    re.IGNORECASE,
)
_GENERATOR_TEXTS = re.compile(
    r"\bSteps: \d+, .{0,200}?\b(Sampler|CFG scale|Seed)\b|^\s*(workflow|prompt)\s*:\s*\{|\bJob ID: [0-9a-f]{8}-[0-9a-f]{4}-",
    re.IGNORECASE | re.DOTALL,
)


def read(data: bytes) -> dict[str, str | None]:
    """The contract's `evidence.provenance` of an image file; never raises.

    Returns:
        `c2pa`: the claim generator of an embedded manifest, or `present`; `digital_source_type`: the short IPTC term;
        `generator_metadata`: where a generator was named and how. Each at most `MAX_CHARS` printable characters, None where
        nothing was found.
    """
    try:
        return find(data)
    except Exception:  # noqa: BLE001 - metadata is a by-product: no fault in it may cost an image its verdict
        return dict.fromkeys(FIELDS)


def find(data: bytes) -> dict[str, str | None]:
    """As `read`, without the net below it."""
    found = metadata.collect(data)
    facts = _xmp_facts(found.xmp)
    types = [match.decode() for match in _SOURCE_TYPE_URI.findall(found.manifest)]
    types += [value.rstrip("/").rpartition("/")[2] for name, value in facts if name == "DigitalSourceType"]
    return {
        "c2pa": _claim_generator(found.manifest) if found.manifest else None,
        "digital_source_type": _strongest(types),
        "generator_metadata": _generator(found, facts),
    }


def bounded(found: object) -> dict[str, str | None]:
    """`found`, from a process that may lie, as exactly the three fields with short printable strings or None."""
    values = found if isinstance(found, dict) else {}
    return {name: _clean(value) if isinstance(value := values.get(name), str) else None for name in FIELDS}


def _clean(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text[: 4 * MAX_CHARS])
    return " ".join(printable.split())[:MAX_CHARS]


def _xmp_facts(xmp: bytes) -> list[tuple[str, str]]:
    """Properties of interest in an XMP packet as (local name, value)."""
    xmp = xmp.strip(b"\0 \t\r\n")
    if not xmp or len(xmp) > MAX_XMP_BYTES:
        return []
    from defusedxml import ElementTree  # most images carry no XMP

    try:
        root = ElementTree.fromstring(xmp, forbid_dtd=True)
    except (SyntaxError, ValueError, LookupError):  # not well-formed, a forbidden declaration, an unknown encoding
        return []
    wanted = ("DigitalSourceType", *_XMP_NAMES)
    facts = []
    for element in root.iter():
        own = element.tag.rpartition("}")[2]
        for name, value in element.attrib.items():
            local = name.rpartition("}")[2]
            if local in wanted:
                facts.append((local, value))
            elif local == "resource" and own in wanted:
                facts.append((own, value))
        if own in wanted and element.text:
            facts.append((own, element.text.strip()))
    return facts


def _strongest(types: list[str]) -> str | None:
    for term in _SOURCE_TYPES:
        if term in types:
            return term
    return next((term for term in types if re.fullmatch(r"[A-Za-z]{3,60}", term)), None)


def _claim_generator(store: bytes) -> str:
    """Who says to have made the claim, of the active manifest, which is the last one; `present` where that is not readable."""
    at = store.rfind(b"\x74claim_generator_info")
    name = store.find(b"\x64name", at, at + 512) if at >= 0 else -1
    text = _cbor_text(store, name + 5) if name >= 0 else ""
    if not text:
        at = store.rfind(b"\x6fclaim_generator")
        text = _cbor_text(store, at + 16) if at >= 0 else ""
    return _clean(text) or "present"


def _cbor_text(data: bytes, at: int) -> str:
    """The CBOR text at `at`; empty where there is none."""
    kind = data[at] if at < len(data) else 0
    if 0x60 <= kind <= 0x77:
        start, size = at + 1, kind - 0x60
    elif 0x78 <= kind <= 0x7A:
        start = at + 1 + (1 << kind - 0x78)
        size = int.from_bytes(data[at + 1 : start], "big")
    else:
        return ""
    return data[start : start + min(size, 4 * MAX_CHARS)].decode("utf-8", "replace")


def _generator(found: Metadata, facts: list[tuple[str, str]]) -> str | None:
    """The first of all texts that names a generator, the surest kind first."""
    for key, value in found.texts:
        if key in _GENERATOR_KEYS:
            return _clean(f"PNG {key}: {value}")
    for where, value in (*_named_texts(found), *((f"XMP {name}", value) for name, value in facts if name in _XMP_NAMES)):
        value = value[:_MAX_SEARCHED_CHARS]
        if _GENERATOR_TEXTS.search(value) or (not where.endswith(("Description", "Comment")) and _GENERATORS.search(value)):
            return _clean(f"{where}: {value}")
    return None


def _named_texts(found: Metadata) -> Iterator[tuple[str, str]]:
    """Texts that may name a generator, with where they stood. Free text is judged more strictly than a field for a tool."""
    for key, value in found.texts:
        yield f"PNG {key}", value
    tags = tiff_tags.read(found.exif, frozenset(_EXIF_NAMES)) if found.exif else {}
    for tag, name in _EXIF_NAMES.items():
        if tag in tags:
            yield f"EXIF {name}", _exif_text(name, tags[tag][:_MAX_SEARCHED_CHARS])


def _exif_text(name: str, value: bytes) -> str:
    if name == "UserComment":
        charset, value = value[:8], value[8:]
        if charset == b"UNICODE\0":
            return value.decode("utf-16-be" if value[:1] == b"\0" else "utf-16-le", "replace")
    return value.rstrip(b"\0").decode("utf-8", "replace")
