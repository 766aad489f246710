"""Widths that several devices can share: a checkpoint with zeros where its feed-forward parts end.

Engines that split a model over N devices give each a part of `intermediate_size`, and of a
quantized matrix whole groups only; 29,568 columns are 231 groups of 128 and split by nothing.
Further columns and rows of zeros change no result: silu(0) · 0 = 0, and 0 times anything is 0. The
tensors are made longer when they are read; nothing is written here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.checkpoint.storages import PLAIN
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.formats.gptq import GptqWeight
from qwenkit.formats.spec import claim
from qwenkit.formats.words import BITS, word_count

DEFAULT_GROUP_SIZE = 128
_MOST_RANKS = 4096
# The matrices of a feed-forward part by their published paths: whose width it is, which matrix.
_MATRIX = re.compile(
    r"(?P<path>.*\.(?P<owner>mlp|mlp\.shared_expert|mlp\.experts\.\d+|mlp\.experts)"
    r"\.(?P<matrix>gate_proj|up_proj|gate_up_proj|down_proj|w1|w2|c_proj))(?:\.(?P<part>\w+))?"
)
_NARROWING = ("down_proj", "c_proj")  # these read the width; the others make it
_WIDTHS = {
    "mlp": ("intermediate_size", "ffn_hidden_size"),
    "mlp.shared_expert": ("shared_expert_intermediate_size",),
    "mlp.experts": ("moe_intermediate_size",),
}
_HALVES = ("qwen",)  # whose config counts both halves of the SwiGLU


@dataclass(frozen=True, slots=True)
class Width:
    """A key of config.json and how wide the part is that it stands for, before and after."""

    key: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Padded:
    """A checkpoint that splits over several devices as far as padding goes, its changed widths, and
    in sentences what padding cannot make divisible.
    """

    checkpoint: Checkpoint
    widths: tuple[Width, ...] = ()
    remarks: tuple[str, ...] = ()

    def said(self, ranks: int) -> list[str]:
        """What was done for so many devices, in sentences."""
        if not self.widths:
            return [f"Every width splits over {ranks} devices as it is.", *self.remarks]
        widths = [f"{w.key}: {w.before:,} wide, padded to {w.after:,}." for w in self.widths]
        return [*widths, *self.remarks]


def pad_for_tensor_parallel(
    checkpoint: Checkpoint, ranks: int, *, group_size: int | None = None
) -> Padded:
    """The checkpoint with every width of a feed-forward part a multiple of `ranks` · `group_size`.

    `group_size` is by default that of a GPTQ checkpoint, else 128. Plain and GPTQ weights can be
    padded. Raises UsageError for anything else, and for ranks or a group size that are none.
    """
    if type(ranks) is not int or not 1 <= ranks <= _MOST_RANKS:
        raise UsageError(f"pad_for_tp: got {ranks!r}; expected 1 to {_MOST_RANKS} devices.")
    size = _group_size(checkpoint, group_size)
    if checkpoint.container == "gguf":
        raise UsageError("pad_for_tp: a GGUF is not padded; export it as a folder first.")
    halves = 2 if checkpoint.config.get("model_type") in _HALVES else 1
    candidates = {}
    for key in (key for keys in _WIDTHS.values() for key in keys):
        given = checkpoint.config.get(key)
        if type(given) is int and given > 0:
            before = given // halves
            candidates[key] = Width(key, before, math.ceil(before / (ranks * size)) * ranks * size)
    padding = _Padding(checkpoint, candidates)
    tensors = padding.tensors()
    changed = {key: candidates[key].after * halves for key in padding.used}
    return Padded(
        checkpoint=replace(checkpoint, config={**checkpoint.config, **changed}, tensors=tensors),
        widths=tuple(candidates[key] for key in candidates if key in padding.used),
        remarks=tuple(_remarks(checkpoint.config, ranks)),
    )


def _group_size(checkpoint: Checkpoint, given: int | None) -> int:
    block = checkpoint.config.get("quantization_config")
    stored = block.get("group_size") if isinstance(block, Mapping) else None
    if given is None:
        whole = type(stored) is int and stored > 0
        return stored if whole else DEFAULT_GROUP_SIZE  # type: ignore[return-value]
    if type(given) is not int or given < 1:
        raise UsageError(f"group_size: got {given!r}; expected a whole number from 1 up.")
    if type(stored) is int and stored > 0 and given % stored:
        raise UsageError(f"group_size: got {given}; the checkpoint has groups of {stored}.")
    return given


def _remarks(config: Mapping[str, Any], ranks: int) -> list[str]:
    """What else must divide, and does not."""
    found = []
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = config.get(key)
        if type(heads) is int and heads > 0 and heads % ranks:
            fits = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            shared = key == "num_key_value_heads" and ranks % heads == 0
            told = "most engines give each device a copy" if shared else "no padding helps"
            found.append(
                f"{key} is {heads}, which {ranks} does not divide; {told}. "
                f"It splits over {', '.join(fits)}."
            )
    return found


class _Padding:
    """The tensors of a checkpoint, made longer where they belong to a padded width."""

    def __init__(self, checkpoint: Checkpoint, widths: Mapping[str, Width]) -> None:
        self.used: set[str] = set()
        self._checkpoint, self._widths = checkpoint, widths
        given = checkpoint.config.get("quantization_config")
        self._quantization: Mapping[str, Any] = given if isinstance(given, Mapping) else {}

    def tensors(self) -> dict[str, StoredTensor]:
        """Raises UsageError naming a tensor that cannot be padded."""
        stored = dict(self._checkpoint.tensors)
        packed: dict[str, tuple[Width, bool, dict[str, StoredTensor]]] = {}
        for name, tensor in self._checkpoint.tensors.items():
            match = _MATRIX.fullmatch(name)
            width = None if match is None else self._width(match["owner"])
            if match is None or width is None or width.after == width.before:
                continue
            self.used.add(width.key)
            narrows = match["matrix"] in _NARROWING
            part = match["part"] or "weight"
            if part in ("weight", "bias") and tensor.storage in PLAIN:
                stored[name] = _padded(tensor, match["matrix"], part, width, narrows)
            else:
                parts = packed.setdefault(match["path"], (width, narrows, {}))[2]
                parts[part] = tensor
        for path, (width, narrows, parts) in packed.items():
            stored |= self._padded_gptq(path, width, narrows, parts)
        return stored

    def _width(self, owner: str) -> Width | None:
        kind = re.sub(r"\.\d+$", "", owner)
        return next((self._widths[key] for key in _WIDTHS[kind] if key in self._widths), None)

    def _padded_gptq(
        self, path: str, width: Width, narrows: bool, parts: dict[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        storage = {part: tensor.storage for part, tensor in parts.items()}
        chosen = claim(storage, self._quantization)
        if chosen is None or chosen.weight is not GptqWeight:
            kind = "these" if chosen is None else chosen.name
            raise UsageError(
                f"{path}: {kind} weights cannot be padded, only plain and GPTQ ones. Pad the "
                "model first and quantize what comes of it."
            )
        words, rows = parts["qweight"].shape
        columns = width.before if narrows else self._hidden_size(path)
        bits = next((b for b in BITS if word_count(columns, b) == words), None)
        if bits is None or (not narrows and rows != width.before):
            raise CheckpointError(
                parts["qweight"].file, path, f"is not as wide as {width.key} says, {width.before}."
            )
        before = rows, columns
        after = (rows, width.after) if narrows else (width.after, columns)
        given = self._quantization.get("group_size")
        size = given if type(given) is int and given > 0 else after[1]
        groups = -(-after[1] // size)
        shapes = {
            "qweight": (word_count(after[1], bits), after[0]),
            "qzeros": (groups, word_count(after[0], bits)),
            "scales": (groups, after[0]),
            "g_idx": (after[1],),
        }
        made = _Gptq(parts, chosen.tag(storage, self._quantization), before, after, size)
        return {
            tensor.name: _resized(tensor, shapes[part], partial(made.part, part))
            for part, tensor in parts.items()
        }

    def _hidden_size(self, path: str) -> int:
        config = self._checkpoint.config
        size = config.get("hidden_size", config.get("n_embd"))
        if type(size) is not int:
            raise UsageError(f"{path}: config.json has no hidden_size.")
        return size


def _padded(
    tensor: StoredTensor, matrix: str, part: str, width: Width, narrows: bool
) -> StoredTensor:
    more = width.after - width.before
    if part == "bias":
        if narrows:
            return tensor
        return _lengthened(tensor, -1, more, width)
    if matrix == "gate_up_proj":  # [experts, gate above up, columns]
        groups, rows, columns = tensor.shape
        if rows != 2 * width.before:
            raise _unlike(tensor, width)

        def read() -> torch.Tensor:
            halves = tensor.read().view(groups, 2, width.before, columns)
            return functional.pad(halves, (0, 0, 0, more)).view(groups, 2 * width.after, columns)

        return _resized(tensor, (groups, 2 * width.after, columns), read)
    return _lengthened(tensor, -1 if narrows else -2, more, width)


def _lengthened(tensor: StoredTensor, dimension: int, more: int, width: Width) -> StoredTensor:
    """`more` zeros at the end of a dimension, counted from the last, -1."""
    if len(tensor.shape) < -dimension or tensor.shape[dimension] != width.before:
        raise _unlike(tensor, width)
    shape = list(tensor.shape)
    shape[dimension] += more
    amounts = (0, 0) * (-dimension - 1) + (0, more)
    return _resized(tensor, tuple(shape), lambda: functional.pad(tensor.read(), amounts))


def _resized(
    tensor: StoredTensor, shape: tuple[int, ...], read: Callable[[], torch.Tensor]
) -> StoredTensor:
    each = PLAIN[tensor.storage].itemsize
    return replace(tensor, shape=shape, size_bytes=math.prod(shape) * each, read=read)


def _unlike(tensor: StoredTensor, width: Width) -> CheckpointError:
    return CheckpointError(
        tensor.file,
        tensor.name,
        f"has the shape {tensor.shape}, which does not fit {width.key}, {width.before}.",
    )


class _Gptq:
    """A GPTQ matrix with further rows or columns of zeros, made when one of its parts is read and
    kept until the others were.
    """

    def __init__(
        self,
        parts: Mapping[str, StoredTensor],
        tag: str,
        before: tuple[int, int],
        after: tuple[int, int],
        group_size: int,
    ) -> None:
        self._parts, self._tag, self._before, self._after = parts, tag, before, after
        self._group_size = group_size
        self._made: dict[str, torch.Tensor] = {}

    def part(self, name: str) -> torch.Tensor:
        """One of its tensors."""
        if name not in self._made:
            self._made = self._make()
        return self._made.pop(name)

    def _make(self) -> dict[str, torch.Tensor]:
        read = {part: tensor.read() for part, tensor in self._parts.items()}
        weight = GptqWeight.from_tensors(read, shape=self._before, storage=self._tag)
        (rows, columns), groups = self._after, -(-self._after[1] // self._group_size)
        middle = 1 << (weight.bits - 1)
        # Where a number is its group's zero point it stands for zero, whatever the scale.
        amounts = (0, groups - weight.scales.shape[0], 0, rows - self._before[0])
        zero_points = functional.pad(weight.zero_points(), amounts, value=middle)
        scales = functional.pad(weight.scales.T.float(), amounts, value=1.0)
        more = torch.arange(self._before[1], columns) // self._group_size
        below = functional.pad(weight.numbers(), (0, 0, 0, rows - self._before[0]), value=middle)
        made = GptqWeight.from_integers(
            torch.cat([below, zero_points[:, more]], 1),
            scales,
            zero_points,
            torch.cat([weight.groups, more]),
            bits=weight.bits,
            is_v2=weight.is_v2,
        )
        tensors = made.to_tensors()
        tensors["scales"] = tensors["scales"].to(read["scales"].dtype)
        return {part: tensors[part] for part in self._parts}
