"""The files of a bundle, read: bounded, verified by their digests, checked tensor by tensor. Every complaint names the file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors

from engine.heads import EMBEDDING_DIM, Heads, HeadsError
from engine.manifest import FORMAT, EncoderPart, FileRef, HeadsPart, Manifest

MAX_MANIFEST_BYTES = 8 * 2**20
MAX_ENCODER_BYTES = 128 * 2**20
MAX_HEADS_BYTES = 512 * 2**20
MAX_MODEL_CARD_BYTES = 4 * 2**20
MAX_REPLAY_BYTES = 256 * 2**20

HEAD_TENSORS = {
    "linear_weight": "linear.weight",
    "linear_bias": "linear.bias",
    "knn_gallery": "knn.gallery",
    "knn_labels": "knn.labels",
    "svm_vectors": "svm.vectors",
    "svm_dual": "svm.dual",
    "svm_intercept": "svm.intercept",
}
KNN_IDS = "knn.ids"


class BundleError(Exception):
    """A bundle cannot be read or written; the message names the file and what is wrong with it."""


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Names (timm's) and shapes of vit_tiny_patch16_224 without a classifier: 5,524,416 parameters."""
    dim, mlp = EMBEDDING_DIM, 4 * EMBEDDING_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 197, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
    }
    for block in range(12):
        for name, shape in {
            "norm1": (dim,),
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "norm2": (dim,),
            "mlp.fc1": (mlp, dim),
            "mlp.fc2": (dim, mlp),
        }.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    shapes["norm.weight"] = shapes["norm.bias"] = (dim,)
    return shapes


def exists(file: Path) -> bool:
    """Whether there is such a file; BundleError where it cannot be known."""
    try:
        return file.exists()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}") from error


def parse_manifest(file: Path, raw: bytes) -> Manifest:
    """The manifest in these bytes; `file` is their name. BundleError: no JSON, another format, a field that is wrong."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: not valid JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise BundleError(f"{file}: unknown format {found!r}; this version reads {FORMAT}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{file}: {problems(error)}") from error


def problems(error: ValidationError) -> str:
    """What is wrong with a manifest, on one line."""
    details = error.errors(include_url=False, include_input=False)
    lines = [f"{'.'.join(str(part) for part in d['loc']) or 'manifest'}: {d['msg']}" for d in details[:5]]
    if len(details) > len(lines):
        lines.append(f"and {len(details) - len(lines)} more")
    return _printable("; ".join(lines))


def _printable(text: str) -> str:
    # Names come from the file: they must not break the line, nor move the cursor of a terminal.
    return "".join(character if character.isprintable() else "?" for character in text)


def load_encoder(folder: Path, part: EncoderPart) -> dict[str, NDArray[np.float32]]:
    """The encoder's arrays, float32, of `encoder_shapes()`. BundleError: the file or a tensor in it is wrong."""
    file = folder / part.file
    tensors = _tensors(file, read_verified(folder, part, MAX_ENCODER_BYTES))
    shapes = encoder_shapes()
    _same_names(file, set(tensors), set(shapes))
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in (np.float32, np.float16):
            raise BundleError(f"{file}: {name}: expected float32 {list(shape)}, found {tensor.dtype} {list(tensor.shape)}")
        if not np.isfinite(tensor).all():
            raise BundleError(f"{file}: {name}: holds a value that is not finite")
    parameters = sum(tensor.size for tensor in tensors.values())
    if parameters != part.parameters:
        raise BundleError(f"{file}: holds {parameters} parameters, the manifest says {part.parameters}")
    return {name: tensors[name].astype(np.float32, copy=False) for name in shapes}


def load_heads(folder: Path, part: HeadsPart) -> Heads:
    """The heads, as many rows as the manifest says. BundleError: the file or a tensor in it is wrong."""
    file = folder / part.file
    tensors = _tensors(file, read_verified(folder, part, MAX_HEADS_BYTES))
    _same_names(file, set(tensors) - {KNN_IDS}, set(HEAD_TENSORS.values()))
    try:
        heads = Heads(
            **{field_name: tensors[name] for field_name, name in HEAD_TENSORS.items()},
            svm_gamma=part.ocsvm.gamma,
            svm_degree=part.ocsvm.degree,
            svm_coef0=part.ocsvm.coef0,
            knn_ids=_parse_ids(file, tensors.get(KNN_IDS)),
        )
    except HeadsError as error:
        tensor = HEAD_TENSORS.get(error.tensor, error.tensor.replace("_", "."))
        raise BundleError(f"{file}: {tensor}: {str(error).partition(': ')[2]}") from error
    fakes = int(heads.knn_labels.sum())
    found = (fakes, len(heads.knn_labels) - fakes, len(heads.svm_dual))
    said = (part.knn.fakes, part.knn.reals, part.ocsvm.support_vectors)
    if found != said:
        raise BundleError(f"{file}: holds (fakes, reals, support vectors) {found}, the manifest says {said}")
    return heads


def _parse_ids(file: Path, tensor: NDArray[Any] | None) -> tuple[str, ...] | None:
    if tensor is None:
        return None
    try:
        return tuple(tensor.astype(np.uint8, casting="equiv").tobytes().decode("utf-8").split("\n"))
    except (UnicodeDecodeError, TypeError) as error:
        raise BundleError(f"{file}: {KNN_IDS}: expected UTF-8 lines as uint8: {error}") from error


def _tensors(file: Path, data: bytes) -> dict[str, NDArray[Any]]:
    try:
        return dict(parse_safetensors(data))
    # KeyError and TypeError: the numpy reader's answer to dtypes that numpy has not (bfloat16, float8).
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{file}: not a readable safetensors file: {error}") from error


def _same_names(file: Path, found: set[str], expected: set[str]) -> None:
    for word, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise BundleError(f"{file}: {word} tensors: {_printable(shown)}")


def read_verified(folder: Path, ref: FileRef, max_bytes: int) -> bytes:
    """A file's bytes, of the digest that the manifest says. BundleError: as `read`, or another digest."""
    data = read(folder, ref.file, max_bytes)
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        raise BundleError(f"{folder / ref.file}: its SHA-256 is {digest}, the manifest says {ref.sha256}")
    return data


def read(folder: Path, name: str, max_bytes: int) -> bytes:
    """A regular file's bytes from within the folder. BundleError: missing, elsewhere, too large, or not a file."""
    file = folder / name
    try:
        real = file.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise BundleError(f"{file}: leads out of its folder, to {real}")
        # Non-blocking, so that a pipe in the place of a file is refused instead of waited for.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BundleError(f"{file}: not a regular file")
            data = stream.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise BundleError(f"{file}: missing") from error
    except (OSError, RuntimeError) as error:
        raise BundleError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > max_bytes:
        raise BundleError(f"{file}: larger than {max_bytes} bytes")
    return data
