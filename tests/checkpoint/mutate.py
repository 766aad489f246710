"""Run as a program: open many damaged copies of one small file and say what became of each.

    python mutate.py {safetensors|gguf} COUNT SEED FOLDER

Every copy must be refused with CheckpointError, or hold exactly what another reader finds in it.
Every fourth GGUF is a whole tiny model and goes through loading: it must load, or be refused with
an error of qwenkit that names the file.
A hang ends the process by SIGALRM; memory is capped. Prints one JSON line.
"""

from __future__ import annotations

import json
import math
import random
import re
import resource
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from crafted import (
    ARRAY,
    F32,
    I32,
    STRING,
    Gguf,
    NaiveGguf,
    Piece,
    array,
    entry,
    model_gguf,
    peak_memory_growth,
    safetensors_bytes,
    scalar,
)

from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.checkpoint.storages import GGML_NUMBERS
from qwenkit.errors import CheckpointError, QwenkitError
from qwenkit.load import load

HANG_S = 20
HEADROOM_BYTES = 2**30
NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    255,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]

LOADABLE = {
    "model_type": "llama",
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def loadable_pieces(path: Path) -> list[Piece]:
    """A GGUF of a whole model with its tokenizer, of random weights; `path` is written over."""
    write_random_gguf(path, LOADABLE, storage="Q8_0")
    naive = NaiveGguf(path.read_bytes())
    gguf = Gguf()
    for key, (kind, value) in naive.metadata.items():
        inner = STRING if kind == ARRAY and isinstance(value[0], str) else I32
        raw = array(inner, value) if kind == ARRAY else scalar(kind, value)
        gguf.keys.append((key, kind, raw))
    for name, (shape, kind, data) in naive.tensors.items():
        gguf.tensors.append((name, shape[::-1], kind, None, data))
    return gguf.pieces()


def safetensors_pieces() -> list[Piece]:
    """A small file; the header is cut so that names, numbers and punctuation can be aimed at."""
    noise = random.Random(3)
    header = {
        "__metadata__": {"format": "pt", "ключ": "值"},
        "model.layers.0.weight": entry("F32", [4, 6], 0, 96),
        "empty": entry("F16", [0, 3], 96, 96),
        "scalar": entry("I64", [], 96, 104),
        "b\\u00e9ta": entry("BF16", [3, 1, 5], 104, 134),
        "bytes": entry("U8", [11], 134, 145),
    }
    raw = safetensors_bytes(json.dumps(header, ensure_ascii=False) + "   ", noise.randbytes(145))
    length, text, data = raw[:8], raw[8:-145], raw[-145:]
    pieces = [Piece("length", length)]
    for token in _json_tokens(text):
        pieces.append(Piece("number" if token.isdigit() else "text", token))
    return [*pieces, Piece("data", data)]


def _json_tokens(text: bytes) -> list[bytes]:
    tokens: list[bytes] = []
    for i in range(len(text)):
        byte = text[i : i + 1]
        if tokens and byte.isdigit() == tokens[-1].isdigit() and byte not in b'"{}[],:':
            tokens[-1] += byte
        else:
            tokens.append(byte)
    return tokens


def mutate(pieces: list[Piece], rng: random.Random, *, relength: bool) -> bytes:
    """One damaged copy: half of the places are drawn by kind of field, half by byte.

    `relength`: a safetensors header may get its new length, so that damage gets past that check.
    """
    raw = bytearray(b"".join(p.raw for p in pieces))
    header_end = len(raw) - len(pieces[-1].raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(raw))
        if rng.random() < 0.5:
            kind = rng.choice(sorted({p.kind for p in pieces if p.raw}))
            number = rng.choice([i for i, p in enumerate(pieces) if p.kind == kind and p.raw])
            start = sum(len(p.raw) for p in pieces[:number])
            at = min(start + rng.randrange(len(pieces[number].raw)), len(raw) - 1)
        before = len(raw)
        _damage(raw, at, rng)
        header_end += len(raw) - before if at < header_end else 0
        if relength and header_end >= 8 and rng.random() < 0.5:
            raw[:8] = struct.pack("<Q", header_end - 8)
        if len(raw) < 8:
            break
    return bytes(raw)


def _damage(raw: bytearray, at: int, rng: random.Random) -> None:
    length = rng.choice([1, 1, 2, 4, 8, 8, 16, 64, rng.randrange(1, 2000)])
    how = rng.randrange(7)
    if how == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        number = rng.choice(
            [*NUMBERS, len(raw), len(raw) + 1, rng.getrandbits(64), rng.randrange(999)]
        )
        raw[at : at + 8] = struct.pack("<Q", number)
    elif how == 2:
        del raw[at : at + length]
    elif how == 3:
        del raw[at:]
        raw += b"" if raw else b"\0"
    elif how == 4:
        raw[at:at] = raw[at : at + length]
    elif how == 5:
        raw[at : at + length] = bytes(len(raw[at : at + length]))
    else:  # something that is well-formed elsewhere
        source = rng.randrange(len(raw))
        size = min(rng.choice([1, 1, 2, 8]), len(raw) - source)
        raw[at : at + size] = raw[source : source + size]


def tensor_bytes(stored: StoredTensor) -> bytes:
    tensor = stored.read()
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_safetensors(checkpoint: Checkpoint, raw: bytes) -> None:
    """Held against the format's own library."""
    theirs = dict(safetensors.deserialize(raw))  # type: ignore[no-untyped-call]
    assert set(theirs) == set(checkpoint.tensors)
    for name, stored in checkpoint.tensors.items():
        assert stored.storage == theirs[name]["dtype"]
        assert list(stored.shape) == list(stored.read().shape) == theirs[name]["shape"]
        assert tensor_bytes(stored) == bytes(theirs[name]["data"])


def check_gguf(checkpoint: Checkpoint, raw: bytes) -> None:
    """Held against a reader that believes everything."""
    naive = NaiveGguf(raw)
    assert set(naive.metadata) == set(checkpoint.gguf_metadata)
    for key, (kind, value) in naive.metadata.items():
        assert same(checkpoint.gguf_metadata[key], value, single=kind == F32), key
    assert set(naive.tensors) == set(checkpoint.tensors)
    for name, (shape, kind, data) in naive.tensors.items():
        stored = checkpoint.tensors[name]
        assert (stored.shape, GGML_NUMBERS[stored.storage]) == (shape, kind)
        assert stored.size_bytes == len(data)
        assert tensor_bytes(stored) == data


def same(ours: Any, theirs: Any, *, single: bool) -> bool:
    """Equal values of equal types; a single float32 is given as its shortest decimal."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(
            same(a, b, single=False) for a, b in zip(ours, theirs, strict=True)
        )
    if isinstance(ours, float):
        if math.isnan(ours):
            return math.isnan(theirs)
        layout = "<f" if single and math.isfinite(ours) else "<d"
        return struct.pack(layout, ours) == struct.pack(layout, theirs)
    return bool(ours == theirs)


def stricter_than_library(raw: bytes, error: CheckpointError) -> bool:
    """True when safetensors' own library reads what we refused, for no reason that we stand by."""
    try:
        safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    stands = ("unknown key", "cannot be read. ", "is too large", "is empty", "twice")
    return not any(reason in str(error) for reason in stands)


def fault_of_refusal(error: QwenkitError, path: Path, raw: bytes) -> str | None:
    """What is wrong with how a damaged file was refused, if anything is."""
    if isinstance(error, CheckpointError):
        if error.file != str(path) or not error.field:
            return f"file or field not named: {error}"
        if path.suffix == ".safetensors" and stricter_than_library(raw, error):
            return f"refused, but well-formed: {error}"
    elif str(path) not in str(error):
        return f"file not named: {type(error).__name__}: {error}"
    return None


def check_loading(checkpoint: Checkpoint, raw: bytes) -> None:
    check_gguf(checkpoint, raw)
    load(checkpoint.path)


def main(kind: str, count: int, seed: int, folder: Path) -> None:
    is_gguf = kind == "gguf"
    path = folder / ("m.gguf" if is_gguf else "model.safetensors")
    (folder / "config.json").write_text("{}")
    target = path if is_gguf else folder
    subjects: list[tuple[list[Piece], Callable[[Checkpoint, bytes], None]]] = (
        [(loadable_pieces(path), check_loading), *[(model_gguf().pieces(), check_gguf)] * 3]
        if is_gguf
        else [(safetensors_pieces(), check_safetensors)]
    )
    for pieces, check in subjects:  # undamaged, they load
        path.write_bytes(b"".join(p.raw for p in pieces))
        check(open_checkpoint(target), path.read_bytes())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM_BYTES, used + HEADROOM_BYTES))
    tally: Counter[str] = Counter()
    faults: list[str] = []
    kinds: set[str] = set()
    with peak_memory_growth() as growth:
        for number in range(count):
            pieces, check = subjects[number % len(subjects)]
            raw = mutate(pieces, random.Random(f"{kind} {seed} {number}"), relength=not is_gguf)
            path.write_bytes(raw)
            signal.alarm(HANG_S)
            try:
                check(open_checkpoint(target), raw)
                tally[f"loaded {check.__name__}"] += 1
            except QwenkitError as error:
                tally[f"refused {type(error).__name__}"] += 1
                kinds.add(re.sub(r"'[^']*'|[\d,]+|\[.*?\]", "", str(error)))
                if fault := fault_of_refusal(error, path, raw):
                    faults.append(f"{number}: {fault}")
            except Exception as error:  # anything else is a fault of ours
                faults.append(f"{number}: {type(error).__name__}: {error}")
            signal.alarm(0)
    report = {"tally": tally, "faults": faults, "growth_bytes": growth[0], "kinds": len(kinds)}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
