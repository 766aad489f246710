"""A model run layer by layer: no more than one layer's weights are held as numbers at a time.

What passes from one layer to the next lies in files, so that rows of any number and length can be
followed, and work that was ended can go on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.spec import Checkpoint
from qwenkit.checkpoint.storages import PLAIN
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.fill import fill_part
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import check_layers, load_tokenizer, read_architecture
from qwenkit.models.spec import Anatomy
from qwenkit.record import read_record
from qwenkit.tensor_names import tensors_by_our_names
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.types.record import ModelRecord

BATCH_TOKENS = 2048  # of whole rows; a longer row is a batch of its own


@dataclass(frozen=True, slots=True)
class Held:
    """How a matrix lies in its files. `storage` is the tag of its format, None for plain numbers;
    `size_bytes` are its bytes, scales included; `bits` those of a number and `group_size` the
    columns that share a scale, where the format says either; `is_symmetric`: it says that zero is
    the middle level.
    """

    storage: str | None
    size_bytes: int
    numbers: int
    bits: int | None = None
    group_size: int | None = None
    is_symmetric: bool = False


class LayerSource:
    """A checkpoint of which the model is built in parts; `skeleton` is the whole of it on the meta
    device. Raises as `load`.
    """

    def __init__(self, path: str | Path | Checkpoint) -> None:
        self.checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        self.architecture, self.config = read_architecture(self.checkpoint)
        check_layers(self.checkpoint, self.config)
        self.tokenizer: BytePairTokenizer = load_tokenizer(self.checkpoint)
        self.record: ModelRecord = read_record(self.checkpoint, self.tokenizer, self.config)
        with torch.device("meta"):
            self.skeleton = self.architecture.build(self.config).eval()
        head_dim = self.config.head_dim
        self.tensors = tensors_by_our_names(self.architecture, self.checkpoint, head_dim)
        self._releases = {t.release for t in self.checkpoint.tensors.values() if t.release}

    @property
    def anatomy(self) -> Anatomy:
        """Where the parts stand."""
        return self.architecture.anatomy

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of most of its plain numbers."""
        return PLAIN[self.record.stored_dtype or "F32"]

    def layer_path(self, number: int) -> str:
        """The path of a decoder layer."""
        return f"{self.anatomy.layers}.{number}"

    def meta_layer(self, number: int) -> nn.Module:
        """A decoder layer without numbers."""
        return copy.deepcopy(self.skeleton.get_submodule(self.layer_path(number)))

    def layer(self, number: int) -> tuple[nn.Module, dict[str, Held]]:
        """A decoder layer in fp32, and how its matrices lie in files, by their paths below it.

        The numbers may be changed. What its file has filled of the memory is let go.
        """
        path, layer = self.layer_path(number), self.meta_layer(number)
        self.fill(path, layer, torch.float32)
        for parameter in layer.parameters():  # fp32 of a file would be the file's own pages
            parameter.data = parameter.data.clone()
        held = {name: self._plain(path, name, m) for name, m in _matrices(layer)}
        self.release()
        return layer, held

    def embedded(self, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """The first layer's inputs, fp32 [tokens, hidden_size], of rows of ids, batch by batch."""
        embedding = self._embedding()
        first = 0
        for batch in batches([len(row) for row in rows]):
            last = first + len(batch.lengths)
            ids = torch.tensor([i for row in rows[first:last] for i in row])
            first = last
            yield embedding(ids, torch.float32)
        self.release()

    def finish(self) -> HeadModel:
        """The last norm and the head, in fp32."""
        norm = copy.deepcopy(self.skeleton.get_submodule(self.anatomy.norm))
        self.fill(self.anatomy.norm, norm, torch.float32)
        head = copy.deepcopy(self.skeleton.get_submodule("lm_head"))
        if self.config.tie_word_embeddings:
            weight = self._embedding().weight
        else:
            self.fill("lm_head", head, torch.float32)
            weight = head.weight  # type: ignore[assignment]
        plain = weight.dequantize(torch.float32) if isinstance(weight, QuantWeight) else weight
        del head.weight
        head.weight = nn.Parameter(plain.detach().float(), requires_grad=False)
        self.release()
        return HeadModel(norm, head)

    def context(self, lengths: Sequence[int]) -> PackedCausal:
        """For whole rows of these lengths, as a request of each would be served."""
        trained = self.record.trained_context_tokens
        return PackedCausal(lengths, rope="per-request", trained_tokens=trained)

    def _embedding(self) -> Embedding:
        embedding = copy.deepcopy(self.skeleton.get_submodule(self.anatomy.embedding))
        assert isinstance(embedding, Embedding)
        # in what it is stored in: of its rows only some are wanted
        self.fill(self.anatomy.embedding, embedding, self.stored_dtype)
        return embedding

    def fill(self, path: str, part: nn.Module, dtype: torch.dtype | None) -> None:
        """Fill a copy of the part at `path`; see `fill_part`."""
        fill_part(path, part, self.architecture, self.checkpoint, self.tensors, dtype=dtype)

    def _plain(self, layer: str, name: str, module: Linear | GroupedLinear) -> Held:
        """How a matrix lies in files; it becomes plain numbers."""
        weight = module.weight
        if isinstance(weight, QuantWeight):
            first = next(iter(weight.children()), weight)  # of experts that are read one by one
            bits, size = getattr(first, "bits", None), getattr(first, "group_size", None)
            middle = bool(getattr(first, "is_symmetric", False))
            count = weight.shape[0] * weight.shape[1]
            held = Held(weight.storage, weight.size_bytes, count, bits, size, middle)
            numbers = weight.dequantize(torch.float32)
            del module.weight
            module.weight = nn.Parameter(numbers, requires_grad=False)
            return held
        stored = self.tensors.get(f"{layer}.{name}.weight")
        each = 4 if stored is None else PLAIN[stored.storage].itemsize
        return Held(None, weight.numel() * each, weight.numel())

    def release(self) -> None:
        """Let go of the memory that the files have filled."""
        for release in self._releases:
            release()


class HeadModel(nn.Module):
    """What follows the last layer."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size] to logits [tokens, vocab_size]."""
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def _matrices(layer: nn.Module) -> list[tuple[str, Linear | GroupedLinear]]:
    return [(n, m) for n, m in layer.named_modules() if isinstance(m, Linear | GroupedLinear)]


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole rows that are computed together: tokens `start` to `stop` of all, in `lengths`."""

    start: int
    stop: int
    lengths: tuple[int, ...]


def batches(lengths: Sequence[int]) -> list[Batch]:
    """Rows of these lengths, in order, as many together as make `BATCH_TOKENS`."""
    found: list[Batch] = []
    start, taken = 0, list[int]()
    for length in lengths:
        if taken and sum(taken) + length > BATCH_TOKENS:
            found.append(Batch(start, start + sum(taken), tuple(taken)))
            start, taken = start + sum(taken), []
        taken.append(length)
    if taken:
        found.append(Batch(start, start + sum(taken), tuple(taken)))
    return found


class Activations:
    """What lies between two layers, [tokens, hidden_size], in a file of bf16 that is mapped.

    A file under its own name is whole: it is written under another one and then renamed.
    """

    def __init__(self, file: Path, tokens: int, columns: int) -> None:
        """Open what `commit` left. Raises CheckpointError where it is missing or cut short."""
        self.file = file
        if not file.is_file() or file.stat().st_size != tokens * columns * 2:
            raise CheckpointError(file, "file", "is missing or cut short; delete its folder.")
        self.numbers = _mapped(file, tokens, columns)

    def rows(self, batch: Batch) -> torch.Tensor:
        """fp32 [tokens, hidden_size], a copy."""
        return self.numbers[batch.start : batch.stop].float()


class WrittenActivations:
    """Such a file while it is being made. Raises UsageError where the disk has no room for it."""

    def __init__(self, file: Path, tokens: int, columns: int) -> None:
        self._file = file
        self._temporary = file.with_name(f"{file.name}.tmp")
        _check_room(file.parent, tokens * columns * 2)
        self._temporary.unlink(missing_ok=True)
        self.numbers = _mapped(self._temporary, tokens, columns)

    def put(self, batch: Batch, x: torch.Tensor) -> None:
        """Write x [tokens, hidden_size] of a batch."""
        self.numbers[batch.start : batch.stop] = x

    def commit(self) -> None:
        """Flush it to the disk and give it its name."""
        descriptor = os.open(self._temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._temporary.replace(self._file)


class KeptInputs:
    """What a matrix reads, [tokens, columns], batch by batch, in a file of bf16 that is mapped."""

    def __init__(self, file: Path, expected: Sequence[Batch], columns: int) -> None:
        """Raises UsageError where the disk has no room: computed again, what leaves the part would
        differ in its last bits, and ended work would not go on to the same bytes.
        """
        file.unlink(missing_ok=True)
        tokens = expected[-1].stop
        _check_room(file.parent, tokens * columns * 2)
        self._numbers = _mapped(file, tokens, columns)
        self._left = iter(expected)

    def append(self, x: torch.Tensor) -> None:
        """Keep what belongs to the next batch."""
        batch = next(self._left)
        self._numbers[batch.start : batch.stop] = x

    def rows(self, batch: Batch) -> torch.Tensor:
        """fp32 [tokens, columns], a copy."""
        return self._numbers[batch.start : batch.stop].float()


def _check_room(folder: Path, size: int) -> None:
    room = os.statvfs(folder)
    if room.f_bavail * room.f_frsize < size:
        raise UsageError(
            f"{folder}: there is no room for {size / 1e9:.1f} GB of activations; choose another "
            "disk, or fewer or shorter rows."
        )


def _mapped(file: Path, tokens: int, columns: int) -> torch.Tensor:
    numbers = torch.from_file(str(file), shared=True, size=tokens * columns, dtype=torch.bfloat16)
    return numbers.view(tokens, columns)
