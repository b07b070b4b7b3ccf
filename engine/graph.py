"""One ONNX graph from a bundle: uint8 crops in, embeddings and raw head scores out; TensorRT, OpenVINO and others compile it.

Written from the bundle's arrays with `onnx.helper`, without torch; the same bundle and precision give the same bytes. The graph
is strongly typed: every change of precision is a Cast in it, and no builder flag is needed. What differs from a literal
transcription is exact, or better conditioned than it:

* normalisation is folded into the patch projection, whose input becomes (pixel - 128) / 64: exact in half precision too;
* patches are cut by a transposition and projected by a matrix product, which has every dtype in every opset (Conv has no
  bfloat16 before 22); the bytes are cast before they are transposed, because TensorRT cannot transpose bytes;
* 1/sqrt(64) is a power of two and goes into the query's weights;
* only the CLS token leaves the encoder, so the last block computes only that query (7% of the work);
* the gallery's mean is subtracted from both classes, where it cancels: smaller products, less rounding;
* the heads never leave float32 (but see `heads_precision`); the linear head is a product and a sum, not a matrix product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from engine.bundle import Bundle
from engine.graph_writer import PRECISIONS, Array, Precision, Writer
from engine.heads import EMBEDDING_DIM, HEADS, Heads
from engine.preprocess import CROP_PX

if TYPE_CHECKING:
    from onnx import ModelProto

Part = Literal["whole", "encoder", "heads"]

INPUT = "crops"
EMBEDDING = "embedding"
RAW = "raw"

OPSET = 20  # the first with Gelu; TensorRT 10 and 11, TensorRT-RTX, OpenVINO and ONNX Runtime read it
IR_VERSION = 9

DEPTH = 12
ATTENTION_HEADS = 3
HEAD_DIM = EMBEDDING_DIM // ATTENTION_HEADS
PATCH_PX = 16
GRID = CROP_PX // PATCH_PX
PATCHES = GRID * GRID
TOKENS = PATCHES + 1
PATCH_VALUES = 3 * PATCH_PX * PATCH_PX

_CENTRE = 128.0
_SCALE = 1.0 / 64.0
_TINY = 1e-12


def model(
    bundle: Bundle, precision: Precision = "fp32", *, heads_precision: Precision = "fp32", part: Part = "whole"
) -> ModelProto:
    """The ONNX model of a bundle.

    Args:
        bundle: what to compile.
        precision: of the encoder's matrix products, softmax and GELU. fp16 also keeps the residual stream in fp16; with
            bf16, whose 8 bits of mantissa are too few for 24 additions in a row, it stays float32.
        heads_precision: of the matrix products of kNN and SVM: fp16 only where a compiler has none in float32 (TensorRT-RTX on
            SM 75); everything around them stays float32.
        part: `whole`: crops uint8 [n, 224, 224, 3] to embedding f32 [n, 192] and raw f32 [n, 3] (columns as `HEADS`);
            `encoder`: without raw; `heads`: embedding to raw.

    Raises:
        ValueError: an unknown precision or part.
        ImportError: the package onnx is not installed.
    """
    from onnx import TensorProto, helper

    if precision not in PRECISIONS or heads_precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r} or {heads_precision!r}; known are {', '.join(PRECISIONS)}")
    if part not in get_args(Part):
        raise ValueError(f"unknown part {part!r}; known are {', '.join(get_args(Part))}")
    writer = Writer()
    crops = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["n", CROP_PX, CROP_PX, 3])
    embedding = helper.make_tensor_value_info(EMBEDDING, TensorProto.FLOAT, ["n", EMBEDDING_DIM])
    raw = helper.make_tensor_value_info(RAW, TensorProto.FLOAT, ["n", len(HEADS)])
    if part != "heads":
        _Encoder(writer, bundle, precision).write()
    if part != "encoder":
        _write_heads(writer, bundle.heads, heads_precision)
    graph = helper.make_graph(
        writer.nodes,
        "code",
        [embedding if part == "heads" else crops],
        {"whole": [embedding, raw], "encoder": [embedding], "heads": [raw]}[part],
        list(writer.constants.values()),
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    built.producer_name = "code-moderation-worker"
    facts = {
        "bundle.name": bundle.manifest.name,
        "bundle.version": bundle.manifest.version,
        "bundle.digest": bundle.digest,
        "preprocess.id": bundle.preprocess.id,
        "precision": precision,
        "precision.heads": heads_precision,
        "raw.columns": ",".join(HEADS),
    }
    helper.set_model_props(built, facts)
    return built


def serialize(built: ModelProto) -> bytes:
    """The model's bytes; the same for the same model."""
    return bytes(built.SerializeToString(deterministic=True))


def reference(bundle: Bundle, crops: Array) -> Array:
    """Embeddings f32 [n, 192] of crops uint8 [n, 224, 224, 3] from the float32 graph in numpy, to hold compiled ones against.

    Slow, a third of a second a crop. Raises as `model`.
    """
    from onnx.reference import ReferenceEvaluator

    [embedding] = ReferenceEvaluator(model(bundle, part="encoder")).run(None, {INPUT: crops})
    return np.asarray(embedding, np.float32)


def architecture(built: ModelProto) -> str:
    """16 hex digits that two models share if they differ in weights only: then one's plan can be refitted to the other."""
    skeleton = hashlib.sha256()
    for node in built.graph.node:
        skeleton.update(node.SerializeToString(deterministic=True))
    for tensor in built.graph.initializer:
        skeleton.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)};".encode())
        if tensor.data_type == tensor.INT64:  # shapes, axes and pads are structure, not weights
            skeleton.update(tensor.raw_data)
    return skeleton.hexdigest()[:16]


class _Encoder:
    """Writes ViT-Tiny/16; names of nodes and constants begin with timm's names of the module."""

    def __init__(self, writer: Writer, bundle: Bundle, precision: Precision) -> None:
        self.writer = writer
        self.weights: Mapping[str, Array] = bundle.encoder
        self.eps = bundle.manifest.encoder.layer_norm_eps
        self.preprocess = bundle.preprocess
        self.precision = precision
        self.residual: Precision = "fp32" if precision == "bf16" else precision

    def write(self) -> None:
        x = self._tokens()
        for index in range(DEPTH):
            x = self._block(f"blocks.{index}", x, last=index == DEPTH - 1)
        x = self.writer.reshape(x, 0, EMBEDDING_DIM, name="cls")
        if self.residual != "fp32":
            x = self.writer.cast(x, "fp32", "cls.fp32")
        self._norm("norm", x, "fp32", out=EMBEDDING)

    def _tokens(self) -> str:
        """Crops uint8 [n, 224, 224, 3] to tokens [n, 197, 192] with their positions."""
        w = self.writer
        x = w.cast(INPUT, self.precision, "crops.cast")
        x = w.node("Sub", x, w.constant("crops.centre", np.array(_CENTRE), self.precision), name="crops.centred")
        x = w.node("Mul", x, w.constant("crops.scale", np.array(_SCALE), self.precision), name="crops.scaled")
        x = w.reshape(x, 0, GRID, PATCH_PX, GRID, PATCH_PX * 3, name="crops.rows")
        x = w.node("Transpose", x, name="crops.patches", perm=[0, 1, 3, 2, 4])
        x = w.reshape(x, 0, PATCHES, PATCH_VALUES, name="crops.flat")
        projection, first = self._folded_projection()
        x = w.node("MatMul", x, w.constant("patch_embed.proj.weight", projection, self.precision), name="patch_embed.proj")
        if self.residual != self.precision:
            x = w.cast(x, self.residual, "patch_embed.wide")
        # A row of zeros for the CLS token: padding, unlike an Expand, needs no arithmetic on shapes.
        x = w.node("Pad", x, w.integers("tokens.pads", 0, 1, 0, 0, 0, 0), name="tokens.padded")
        return w.node("Add", x, w.constant("pos_embed", first, self.residual), name="tokens")

    def _folded_projection(self) -> tuple[Array, Array]:
        """The patch projection [768, 192] for (pixel - 128) / 64, and what is added to the tokens [1, 197, 192]."""
        kernel = self.weights["patch_embed.proj.weight"].astype(np.float64)  # [192, 3, 16, 16]
        mean, std = (np.array(values, np.float64)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        per_value = kernel / (255.0 * std)
        bias = self.weights["patch_embed.proj.bias"] + (per_value * (_CENTRE - 255.0 * mean)).sum(axis=(1, 2, 3))
        # Rows in the order in which the pixels of a patch lie: y, x, channel.
        projection = (per_value / _SCALE).transpose(2, 3, 1, 0).reshape(PATCH_VALUES, EMBEDDING_DIM)
        added = self.weights["pos_embed"].astype(np.float64)
        added = added + np.concatenate([self.weights["cls_token"][0].astype(np.float64), np.tile(bias, (PATCHES, 1))])
        return projection, added

    def _block(self, name: str, x: str, last: bool) -> str:
        attended = self._attention(f"{name}.attn", self._norm(f"{name}.norm1", x, self.precision), last)
        if last:
            x = self._first_token(x, f"{name}.cls")
        x = self._add(f"{name}.mid", x, attended)
        hidden = self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.norm2", x, self.precision))
        hidden = self.writer.node("Gelu", hidden, name=f"{name}.mlp.gelu")
        return self._add(f"{name}.out", x, self._linear(f"{name}.mlp.fc2", hidden))

    def _attention(self, name: str, x: str, last: bool) -> str:
        w = self.writer
        # Rows of timm's qkv: query, key, value. The 1/8 of the scaled product goes into the query.
        scale = np.repeat([HEAD_DIM**-0.5, 1.0, 1.0], EMBEDDING_DIM)
        weight = self.weights[f"{name}.qkv.weight"] * scale[:, None]
        bias = self.weights[f"{name}.qkv.bias"] * scale
        if last:
            cut = EMBEDDING_DIM
            cls = self._first_token(x, f"{name}.cls")
            query = self._split_heads(f"{name}.q", self._product(f"{name}.q", cls, weight[:cut], bias[:cut]), 1, 1)
            rest = self._split_heads(f"{name}.kv", self._product(f"{name}.kv", x, weight[cut:], bias[cut:]), TOKENS, 2)
            parts = [f"{name}.key", f"{name}.value"]
        else:
            rest = self._split_heads(f"{name}.qkv", self._product(f"{name}.qkv", x, weight, bias), TOKENS, 3)
            parts = [query := f"{name}.query", f"{name}.key", f"{name}.value"]
        self._split(rest, parts)
        key, value = parts[-2:]
        key = w.node("Transpose", key, name=f"{name}.key.t", perm=[0, 1, 3, 2])
        logits = w.node("MatMul", query, key, name=f"{name}.logits")
        probabilities = w.node("Softmax", logits, name=f"{name}.softmax", axis=-1)
        x = w.node("MatMul", probabilities, value, name=f"{name}.context")
        x = w.node("Transpose", x, name=f"{name}.context.t", perm=[0, 2, 1, 3])
        x = w.reshape(x, 0, 1 if last else TOKENS, EMBEDDING_DIM, name=f"{name}.joined")
        return self._linear(f"{name}.proj", x)

    def _split_heads(self, name: str, x: str, tokens: int, parts: int) -> str:
        """[n, tokens, parts * 192] to [n, parts * 3, tokens, 64]."""
        x = self.writer.reshape(x, 0, tokens, parts * ATTENTION_HEADS, HEAD_DIM, name=f"{name}.heads")
        return self.writer.node("Transpose", x, name=f"{name}.heads.t", perm=[0, 2, 1, 3])

    def _split(self, x: str, outputs: list[str]) -> None:
        from onnx import helper

        self.writer.nodes.append(helper.make_node("Split", [x], outputs, name=f"{x}.split", axis=1, num_outputs=len(outputs)))

    def _first_token(self, x: str, name: str) -> str:
        w = self.writer
        return w.node("Slice", x, w.integers("zero", 0), w.integers("one", 1), w.integers("one", 1), name=name)

    def _linear(self, name: str, x: str) -> str:
        return self._product(name, x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _product(self, name: str, x: str, weight: Array, bias: Array) -> str:
        """x @ weight.T + bias."""
        w = self.writer
        x = w.node("MatMul", x, w.constant(f"{name}.weight", weight.T, self.precision), name=f"{name}.product")
        return w.node("Add", x, w.constant(f"{name}.bias", bias, self.precision), name=name)

    def _add(self, name: str, x: str, branch: str) -> str:
        if self.residual != self.precision:
            branch = self.writer.cast(branch, self.residual, f"{branch}.wide")
        return self.writer.node("Add", x, branch, name=name)

    def _norm(self, name: str, x: str, to: Precision, out: str | None = None) -> str:
        """LayerNorm; its statistics are float32 in every variant (stash_type)."""
        w = self.writer
        own: Precision = "fp32" if out else self.residual
        scale = w.constant(f"{name}.weight", self.weights[f"{name}.weight"], own)
        shift = w.constant(f"{name}.bias", self.weights[f"{name}.bias"], own)
        x = w.node("LayerNormalization", x, scale, shift, name=out or name, axis=-1, epsilon=self.eps, stash_type=1)
        return x if to == own else w.cast(x, to, f"{name}.narrow")


def _write_heads(w: Writer, heads: Heads, precision: Precision) -> None:
    """Embedding f32 [n, 192] to raw f32 [n, 3]; the formulas are those of `Heads.raw_scores`."""
    columns = [_write_linear(w, heads), _write_knn(w, heads, precision), _write_ocsvm(w, heads, precision)]
    w.node("Concat", *columns, name=RAW, axis=1)


def _write_linear(w: Writer, heads: Heads) -> str:
    x = w.node("Mul", EMBEDDING, w.constant("linear.weight", heads.linear_weight[None, :]), name="linear.terms")
    x = w.node("ReduceSum", x, w.integers("one", 1), name="linear.sum", keepdims=1)
    return w.node("Add", x, w.constant("linear.bias", heads.linear_bias.reshape(1, 1)), name="linear")


def _write_knn(w: Writer, heads: Heads, precision: Precision) -> str:
    length = w.node("ReduceL2", EMBEDDING, w.integers("one", 1), name="knn.length", keepdims=1)
    length = w.node("Max", length, w.constant("knn.tiny", np.full((1, 1), _TINY)), name="knn.length.safe")
    unit = w.node("Div", EMBEDDING, length, name="knn.unit")
    gallery = heads.knn_gallery.astype(np.float64)
    gallery = gallery - gallery.mean(axis=0)
    fakes = _head_product(w, "knn.fakes", unit, gallery[heads.knn_labels == 1], precision)
    reals = _head_product(w, "knn.reals", unit, gallery[heads.knn_labels == 0], precision)
    fakes = w.node("ReduceMax", fakes, w.integers("one", 1), name="knn.fakes.nearest", keepdims=1)
    reals = w.node("ReduceMax", reals, w.integers("one", 1), name="knn.reals.nearest", keepdims=1)
    return w.node("Sub", fakes, reals, name="knn")


def _write_ocsvm(w: Writer, heads: Heads, precision: Precision) -> str:
    vectors = heads.svm_vectors.astype(np.float64) * heads.svm_gamma
    # A power of two brings the vectors near one, inside fp16's range, and goes out again in float32.
    scale = 2.0 ** np.ceil(np.log2(max(float(np.abs(vectors).max()), _TINY)))
    x = _head_product(w, "ocsvm.products", EMBEDDING, vectors / scale, precision)
    x = w.node("Mul", x, w.constant("ocsvm.scale", np.full((1, 1), scale)), name="ocsvm.scaled")
    base = w.node("Add", x, w.constant("ocsvm.coef0", np.full((1, 1), heads.svm_coef0)), name="ocsvm.base")
    power = base
    for exponent in range(2, heads.svm_degree + 1):
        power = w.node("Mul", power, base, name=f"ocsvm.power.{exponent}")
    # Each term takes its share of the intercept along: the sums stay small where terms and intercept all but cancel.
    share = float(heads.svm_intercept) / len(heads.svm_dual)
    terms = w.node("Mul", power, w.constant("ocsvm.dual", -heads.svm_dual[None, :]), name="ocsvm.weighted")
    terms = w.node("Sub", terms, w.constant("ocsvm.intercept", np.full((1, 1), share)), name="ocsvm.terms")
    return w.node("ReduceSum", terms, w.integers("one", 1), name="ocsvm", keepdims=1)


def _head_product(w: Writer, name: str, x: str, rows: Array, precision: Precision) -> str:
    """x [n, 192] @ rows.T [192, r], float32 in and out."""
    if precision != "fp32":
        x = w.cast(x, precision, f"{name}.narrow")
    x = w.node("MatMul", x, w.constant(f"{name}.rows", rows.T, precision), name=f"{name}.product")
    return x if precision == "fp32" else w.cast(x, "fp32", f"{name}.wide")
