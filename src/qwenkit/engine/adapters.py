"""The adapters that an engine has by name, and which rows of a step have which.

Names come and go while requests run; a key never comes back. What was computed with an adapter, as
keys and values of a prefix, belongs to its key and not to its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import cast

from torch import nn

from qwenkit.adapters.bank import AdapterBank, Piece, Segment, segments
from qwenkit.adapters.peft_files import LoraAdapter
from qwenkit.engine.plan import Chunk
from qwenkit.engine.served import ServedModel
from qwenkit.errors import RequestError, UsageError, suggest

NO_ADAPTER = 0


class LoadedAdapters:
    """The adapters of one model. `prepare`, `names` and `key` may be asked from any thread, the
    rest runs in the engine's own, between steps.
    """

    def __init__(self, model: ServedModel, *, native: bool) -> None:
        self._model = model
        self._native = native
        self._keys: dict[str, int] = {}
        self._new_keys = count(NO_ADAPTER + 1)
        self._bank: AdapterBank | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded ones, oldest first."""
        return tuple(self._keys)

    @property
    def model(self) -> ServedModel:
        """What computes a step in which a row has an adapter, after `choose`."""
        assert self._bank is not None, "an adapter is loaded"
        return cast(ServedModel, self._bank.model)

    def key(self, name: str | None) -> int:
        """The number of what is loaded under this name, 0 for None. Raises RequestError naming
        those that are loaded.
        """
        if name is None:
            return NO_ADAPTER
        key = self._keys.get(name)
        if key is None:
            known = self.names
            advice = suggest(name, known) if known else "No adapter is loaded."
            raise RequestError("adapter", f"{name!r} is not loaded. {advice}")
        return key

    def prepare(self, adapter: LoraAdapter) -> dict[str, Piece]:
        """The slow part of loading. Raises CheckpointError or UsageError when it does not fit."""
        if not isinstance(self._model, nn.Module):
            raise UsageError("adapter: this model is no torch module, so nothing can adapt it.")
        return AdapterBank(self._model, native=self._native).prepare(adapter)

    def add(self, name: str, pieces: dict[str, Piece]) -> None:
        """Take in what `prepare` made. Raises UsageError for a name that is in use or empty."""
        if not isinstance(name, str) or not name:
            raise UsageError(f"adapter: expected a name, got {name!r}.")
        if name in self._keys:
            raise UsageError(f"adapter: {name!r} is loaded already; unload it first.")
        assert isinstance(self._model, nn.Module), "prepare has checked it"
        if self._bank is None:
            self._bank = AdapterBank(self._model, native=self._native)
        key = next(self._new_keys)
        self._bank.add(key, pieces)
        self._keys[name] = key

    def remove(self, name: str, *, users: int) -> None:
        """Forget an adapter and free its memory. Raises RequestError for an unknown name,
        UsageError while `users` requests need it.
        """
        key = self.key(name)
        if users:
            raise UsageError(
                f"adapter: {name!r} is in use by {users} requests. Let them finish, or abort them."
            )
        assert self._bank is not None
        del self._keys[name]
        self._bank.remove(key)
        if not self._keys:
            self._bank = None

    def choose(self, keys: Sequence[int], chunks: Sequence[Chunk]) -> bool:
        """Prepare the model for a step of these chunks, each with the adapter of its key. False:
        no row has one, so the plain model is what computes it.
        """
        if not any(keys):
            return False
        tokens = segments(keys, (len(chunk.token_ids) for chunk in chunks))
        rows = (0 if chunk.hidden else chunk.rows for chunk in chunks)
        sampled: tuple[Segment, ...] = segments(keys, rows)
        assert self._bank is not None
        self._bank.choose(tokens, sampled)
        return True
