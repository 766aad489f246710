"""Small model files put together byte by byte, well-formed and not, and a reader of GGUF that
shares nothing with ours and checks nothing.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"} | {
    U64: "Q",
    I64: "q",
    F64: "d",
}
PLAIN_TYPES = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}  # GGML number → bytes
BLOCK_TYPES = {2: (32, 18), 3: (32, 20), 8: (32, 34), 14: (256, 210)}


def safetensors_bytes(header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with the header as given, right or wrong."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: Sequence[object], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@dataclass
class Piece:
    """A stretch of the file that means one thing, for mutations that aim."""

    kind: str
    raw: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + _LETTERS[kind], value)


def array(kind: int, values: Sequence[Any]) -> bytes:
    items = b"".join(scalar(kind, v) for v in values)
    return struct.pack("<IQ", kind, len(values)) + items


Key = tuple[str | bytes, int, bytes]
Tensor = tuple[str | bytes, Sequence[int], int, int | None, bytes]


@dataclass
class Gguf:
    """A GGUF to be: every count and offset can be set wrong. Dimensions are innermost first;
    an offset of None means the right one.
    """

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    data: bytes | None = None

    def pieces(self) -> list[Piece]:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.keys) if self.key_count is None else self.key_count
        out = [Piece("magic", self.magic), Piece("version", self.version)]
        out.append(Piece("tensor count", struct.pack("<Q", tensor_count)))
        out.append(Piece("key count", struct.pack("<Q", key_count)))
        for key, kind, value in self.keys:
            out.append(Piece("key", text(key)))
            out.append(Piece("value type", struct.pack("<I", kind)))
            if kind == ARRAY:
                out.append(Piece("array head", value[:12]))
                out.append(Piece("array items", value[12:]))
            else:
                out.append(Piece(f"value {kind}", value))
        position, data = 0, b""
        for name, dimensions, kind, offset, raw in self.tensors:
            out.append(Piece("tensor name", text(name)))
            out.append(Piece("dimension count", struct.pack("<I", len(dimensions))))
            out.append(Piece("dimensions", struct.pack(f"<{len(dimensions)}Q", *dimensions)))
            out.append(Piece("tensor type", struct.pack("<I", kind)))
            out.append(Piece("offset", struct.pack("<Q", position if offset is None else offset)))
            data += raw + bytes(-len(raw) % self.alignment)
            position = len(data)
        header = sum(len(piece.raw) for piece in out)
        out.append(Piece("padding", bytes(-header % self.alignment)))
        out.append(Piece("data", data if self.data is None else self.data))
        return out

    def build(self) -> bytes:
        return b"".join(piece.raw for piece in self.pieces())


def model_keys(architecture: str = "llama") -> list[Key]:
    """The metadata of a small language model, with a value of every type among them."""
    a = architecture
    tokens = [f"<{i}>" for i in range(6)] + ["Ġthe", "日本", "e\u0301", ""]
    return [
        ("general.architecture", STRING, text(a)),
        ("general.license", STRING, text("apache-2.0")),
        (f"{a}.block_count", U32, scalar(U32, 1)),
        (f"{a}.embedding_length", U32, scalar(U32, 32)),
        (f"{a}.feed_forward_length", U64, scalar(U64, 64)),
        (f"{a}.attention.head_count", U32, scalar(U32, 4)),
        (f"{a}.attention.head_count_kv", U16, scalar(U16, 2)),
        (f"{a}.attention.layer_norm_rms_epsilon", F32, scalar(F32, 1e-5)),
        (f"{a}.rope.freq_base", F32, scalar(F32, 10000.0)),
        (f"{a}.context_length", U32, scalar(U32, 128)),
        ("tokenizer.ggml.tokens", ARRAY, array(STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, array(I32, [3] * 6 + [1] * 4)),
        ("tokenizer.ggml.scores", ARRAY, array(F32, [0.1 * i for i in range(10)])),
        ("tokenizer.ggml.eos_token_id", U32, scalar(U32, 2)),
        ("tokenizer.ggml.add_bos_token", BOOL, scalar(BOOL, False)),
        ("test.i8", I8, scalar(I8, -3)),
        ("test.u8", U8, scalar(U8, 200)),
        ("test.i16", I16, scalar(I16, -300)),
        ("test.i32", I32, scalar(I32, -70000)),
        ("test.i64", I64, scalar(I64, -(2**40))),
        ("test.f64", F64, scalar(F64, 0.1)),
        ("test.flags", ARRAY, array(BOOL, [True, False, True])),
        ("test.nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + array(U8, [1, 2]) + array(U8, [])),
    ]


def model_tensors() -> list[Tensor]:
    """The embedding and tensors of several types, filled with noise from a fixed seed."""
    noise = random.Random(5)
    return [
        ("token_embd.weight", (32, 10), 8, None, noise.randbytes(10 * 34)),
        ("blk.0.attn_norm.weight", (32,), 0, None, noise.randbytes(128)),
        ("blk.0.ffn_up.weight", (32, 3), 2, None, noise.randbytes(3 * 18)),
        ("blk.0.ffn_down.weight", (256, 2), 14, None, noise.randbytes(2 * 210)),
        ("half", (5, 3), 1, None, noise.randbytes(30)),
        ("numbers", (2, 2, 2), 27, None, noise.randbytes(64)),
        ("one", (), 28, None, noise.randbytes(8)),
    ]


def model_gguf() -> Gguf:
    return Gguf(keys=model_keys(), tensors=model_tensors())


class NaiveGguf:
    """What a GGUF's bytes say, read with no check at all."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 8
        tensor_count, key_count = self._take("Q"), self._take("Q")
        self.metadata: dict[str, tuple[int, Any]] = {}
        for _ in range(key_count):
            key, kind = self._text(), self._take("I")
            self.metadata[key] = (kind, self._value(kind))
        table = []
        for _ in range(tensor_count):
            name, count = self._text(), self._take("I")
            dimensions = [self._take("Q") for _ in range(count)]
            table.append((name, tuple(dimensions[::-1]), self._take("I"), self._take("Q")))
        alignment = self.metadata.get("general.alignment", (U32, 32))[1]
        start = -(-self.at // alignment) * alignment
        self.tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = {}
        for name, shape, kind, offset in table:
            size = 1
            for dimension in shape:
                size *= dimension
            if kind in PLAIN_TYPES:
                size *= PLAIN_TYPES[kind]
            else:
                elements, block_bytes = BLOCK_TYPES[kind]
                size = size // elements * block_bytes
            data = raw[start + offset : start + offset + size]
            assert len(data) == size
            self.tensors[name] = (shape, kind, data)

    def _take(self, letter: str) -> int:
        value: int = struct.unpack_from("<" + letter, self.raw, self.at)[0]
        self.at += struct.calcsize(letter) if letter not in "Qqd" else 8
        return value

    def _text(self) -> str:
        length = self._take("Q")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            inner, count = self._take("I"), self._take("Q")
            return [self._value(inner) for _ in range(count)]
        value = self._take(_LETTERS[kind])
        return bool(value) if kind == BOOL else value


@contextmanager
def peak_memory_growth() -> Iterator[list[int]]:
    """Measures how far resident memory rose above its start inside the block, in bytes (Linux)."""
    growth: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_bytes("VmRSS")
    yield growth
    growth.append(_status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
