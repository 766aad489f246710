"""Any checkpoint as one GGUF file of one of llama.cpp's mixtures, tensor by tensor.

No more than one part of the model, a decoder layer, the embedding or the head, is held at a time,
and of what is made of it some rows; a model of any size takes the memory of its largest part.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qwenkit.checkpoint.gguf_metadata import Metadata
from qwenkit.checkpoint.gguf_write import TensorEntry, write_gguf
from qwenkit.checkpoint.imatrix import Imatrix
from qwenkit.checkpoint.names import given_path
from qwenkit.checkpoint.storages import BLOCKS, PLAIN, size_bytes
from qwenkit.errors import CheckpointError, NonFiniteError, UsageError
from qwenkit.fill import refuse_another
from qwenkit.formats.ggml_quantize import quantize_blocks
from qwenkit.kernels.finite import is_finite
from qwenkit.layers.linear import Embedding
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import Loaded
from qwenkit.models.published import GgufSlot, gguf_layout
from qwenkit.quantize.gguf_scheme import (
    Choice,
    ModelFacts,
    Scheme,
    choose_storages,
    find_scheme,
)
from qwenkit.quantize.stream import LayerSource
from qwenkit.save import gguf_metadata

_SLAB_NUMBERS = 1 << 20  # of fp32, 4 MiB: each thread holds a few times that
_QUANTIZATION_VERSION = 2  # of GGML's block layouts
_LAYER = re.compile(r"(.*?\.\d+)\.")
_SEEN_BY_NO_MATRIX = ("token_embd.weight", "output.weight")  # what llama-imatrix leaves out


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `numbers` are those of all tensors; `storages` says how many tensors have
    each type, `smaller_blocks` which took another type because of their width, `requantized` which
    were quantized otherwise before, and `without_importance` which had no entry.
    """

    path: Path
    size_bytes: int
    numbers: int
    storages: Mapping[str, int]
    smaller_blocks: tuple[str, ...]
    requantized: tuple[str, ...]
    without_importance: tuple[str, ...]

    @property
    def bits_per_number(self) -> float:
        """Of the tensors, without the metadata."""
        return self.size_bytes * 8 / self.numbers


def export_gguf(
    source: LayerSource | str | Path,
    path: str | Path,
    gguf: str,
    *,
    imatrix: Imatrix | None = None,
    imatrix_file: str = "",
    progress: Callable[[float], None] | None = None,
) -> Exported:
    """Write the checkpoint at `source`, of any format, as the GGUF file `path` in the mixture
    `gguf` ("q4_k_m", "bf16" …).

    Matrices are rounded from their numbers in fp32, with the importances of `imatrix`, whose file
    is named `imatrix_file`; one that is stored in the wanted type already keeps its bytes.
    `progress` is told the share done, 0 to 1. Raises as `load` does, UsageError for an unknown
    mixture, what GGUF has no place for or an importance matrix of another model, NonFiniteError for
    numbers that a type cannot hold.
    """
    scheme, target = find_scheme(gguf), given_path("path", path)
    given = source if isinstance(source, LayerSource) else LayerSource(source)
    _refuse_left_over(given)
    slots = gguf_layout(given.skeleton, given.architecture)
    shapes = [(slot.name, slot.shape) for slot in slots]
    choices = choose_storages(scheme, shapes, _facts(given), has_importance=imatrix is not None)
    means = {} if imatrix is None else _importances(slots, choices, imatrix)
    metadata = gguf_metadata(_described(given)) | _file_metadata(scheme, imatrix, imatrix_file)
    numbers = sum(math.prod(slot.shape) for slot in slots)
    with _one_thread_an_op() as threads, ThreadPoolExecutor(threads) as workers:
        work = _Work(_Parts(given), choices, means, numbers, workers, threads, progress)
        entries: list[TensorEntry] = [
            (slot.name, slot.shape, choices[slot.name].tag, partial(work.pieces, slot))
            for slot in slots
        ]
        write_gguf(target, metadata, entries)
    return Exported(
        path=target,
        size_bytes=sum(size_bytes(choices[slot.name].tag, slot.shape) for slot in slots),
        numbers=numbers,
        storages=dict(Counter(choice.tag for choice in choices.values())),
        smaller_blocks=tuple(n for n, choice in choices.items() if choice.tag != choice.wanted),
        requantized=tuple(work.requantized),
        without_importance=tuple(
            name
            for name, choice in choices.items()
            if imatrix is not None
            and choice.tag in BLOCKS
            and name not in means
            and name not in _SEEN_BY_NO_MATRIX
        ),
    )


@contextmanager
def _one_thread_an_op() -> Iterator[int]:
    """Inside, torch works with one thread, for whole slabs are shared among as many as it had: that
    number. Where other programs run, waiting for each other after every small op takes far longer
    than the ops.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class _Parts:
    """The weights of a model, of which one part is held at a time."""

    def __init__(self, source: LayerSource) -> None:
        self._source = source
        self._held: tuple[str, nn.Module] | None = None

    def value(self, path: str, part: str) -> torch.Tensor | QuantWeight:
        """A weight as it is stored. The part of the model that was held before is let go."""
        source, unit = self._source, _unit(path)
        if self._held is None or self._held[0] != unit:
            self._held = None
            source.release()
            module = copy.deepcopy(source.skeleton.get_submodule(unit))
            source.fill(unit, module, None)
            self._held = unit, module
            head = source.tensors.get("lm_head.weight")
            if isinstance(module, Embedding) and source.config.tie_word_embeddings and head:
                refuse_another(module.weight, head)
        below = path[len(unit) + 1 :]
        owner = self._held[1].get_submodule(below) if below else self._held[1]
        value: torch.Tensor | QuantWeight = getattr(owner, part)
        return value


def _refuse_left_over(source: LayerSource) -> None:
    units = {_unit(name.rpartition(".")[0]) for name, _ in source.skeleton.named_parameters()}
    units.add("lm_head")  # which shares its parameter where it is tied
    for name in source.tensors:
        if units.isdisjoint(_steps(name)) and not name.endswith(source.architecture.ignored):
            raise CheckpointError(
                source.checkpoint.path, "tensors", f"belongs to no part of the model: {name}."
            )


def _facts(source: LayerSource) -> ModelFacts:
    return ModelFacts(
        arch=source.architecture.gguf_arch,
        layers=source.config.num_hidden_layers,
        heads=source.config.num_attention_heads,
        kv_heads=source.config.num_key_value_heads,
        experts=getattr(source.config, "num_experts", 0),
    )


def _described(source: LayerSource) -> Loaded:
    """All that the checkpoint says of the model, which has no numbers here."""
    checkpoint, record = source.checkpoint, source.record
    return Loaded(source.skeleton, source.config, record, source.tokenizer, checkpoint)


def _unit(path: str) -> str:
    """The part that is held as a whole: the decoder layer of a module, or the module itself."""
    layer = _LAYER.match(f"{path}.")
    return layer[1] if layer else path


def _steps(name: str) -> Iterator[str]:
    """Every path that a tensor stands below."""
    at = name.rfind(".")
    while at > 0:
        yield name[:at]
        at = name.rfind(".", 0, at)


class _Work:
    """Makes the tensors of the file, each when its turn comes."""

    def __init__(
        self,
        parts: _Parts,
        choices: Mapping[str, Choice],
        means: Mapping[str, torch.Tensor],
        numbers: int,
        workers: ThreadPoolExecutor,
        threads: int,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.requantized: list[str] = []
        self._parts, self._choices, self._means = parts, choices, means
        self._workers, self._threads = workers, threads
        self._numbers, self._done, self._progress = numbers, 0, progress

    def pieces(self, slot: GgufSlot) -> Iterator[torch.Tensor]:
        """The bytes of a tensor, some rows after others."""
        tag = self._choices[slot.name].tag
        value = self._parts.value(slot.path, slot.part)
        stored = value.storage if isinstance(value, QuantWeight) else None
        if stored == tag or not slot.is_matrix:
            yield slot.of(value).tensor
            self._advance(math.prod(slot.shape))
            return
        if stored is not None and tag in BLOCKS:
            self.requantized.append(slot.name)
        means = self._means.get(slot.name)
        rows = slot.shape[-2]

        def make(slab: tuple[int, int]) -> torch.Tensor:
            numbers = slot.numbers(value, *slab)
            counts = None if means is None else means[slab[0] // rows]
            return _stored(slot.name, numbers, tag, counts)

        jobs: deque[Future[torch.Tensor]] = deque()
        for slab in _slabs(slot.matrices, rows, slot.columns):
            jobs.append(self._workers.submit(make, slab))
            if len(jobs) > self._threads:
                yield self._made(jobs, slot)
        while jobs:
            yield self._made(jobs, slot)

    def _made(self, jobs: deque[Future[torch.Tensor]], slot: GgufSlot) -> torch.Tensor:
        made = jobs.popleft().result()
        self._advance(len(made) * slot.columns)
        return made

    def _advance(self, numbers: int) -> None:
        self._done += numbers
        if self._progress is not None:
            self._progress(self._done / self._numbers)


def _slabs(matrices: int, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows of all `matrices`, some at a time, each time of one of them."""
    step = max(1, _SLAB_NUMBERS // columns)
    for first in range(0, matrices * rows, rows):
        for start in range(first, first + rows, step):
            yield start, min(start + step, first + rows)


def _stored(
    name: str, numbers: torch.Tensor, tag: str, importance: torch.Tensor | None
) -> torch.Tensor:
    if tag in PLAIN:
        narrow = numbers.to(PLAIN[tag])
        if not is_finite(narrow):
            raise NonFiniteError(f"{name}: some numbers are too large for {tag}. Choose bf16.")
        return narrow
    try:
        return quantize_blocks(numbers, tag, importance)
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from error


def _importances(
    slots: Sequence[GgufSlot], choices: Mapping[str, Choice], imatrix: Imatrix
) -> dict[str, torch.Tensor]:
    """The mean squares [matrices, columns] of every matrix to be quantized that has an entry.

    Raises UsageError where nothing fits or an entry has other sizes: it is of another model.
    """
    found = {}
    for slot in slots:
        entry = imatrix.entries.get(slot.name)
        if entry is None or choices[slot.name].tag not in BLOCKS:
            continue
        means = entry.means(slot.matrices, slot.columns)
        if means is None:
            raise UsageError(
                f"imatrix: {slot.name} has {entry.sums.numel()} columns there, here "
                f"{slot.matrices * slot.columns}: it is of another model."
            )
        found[slot.name] = means
    if not found and any(choice.tag in BLOCKS for choice in choices.values()):
        some = ", ".join(list(imatrix.entries)[:3])
        raise UsageError(f"imatrix: none of its entries ({some} …) is a matrix of this model.")
    return found


def _file_metadata(scheme: Scheme, imatrix: Imatrix | None, imatrix_file: str) -> Metadata:
    """What the file says of its own making, as llama-quantize does."""
    metadata: Metadata = {"general.file_type": scheme.file_type}
    if scheme.is_quantized:
        metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    if imatrix is not None and scheme.is_quantized:
        if imatrix_file:
            metadata["quantize.imatrix.file"] = Path(imatrix_file).name
        metadata |= {
            "quantize.imatrix.entries_count": ("i32", len(imatrix.entries)),
            "quantize.imatrix.chunks_count": ("i32", imatrix.chunks),
        }
        if imatrix.datasets:
            metadata["quantize.imatrix.dataset"] = imatrix.datasets[0]
    return metadata
