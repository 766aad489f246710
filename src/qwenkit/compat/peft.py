"""`AutoPeftModelForCausalLM`: an adapter with the model that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwenkit.adapter_files import read_adapter
from qwenkit.adapters.bank import AdapterBank, Segment
from qwenkit.api import LLM
from qwenkit.checkpoint.hub import resolve
from qwenkit.compat.model import AutoModelForCausalLM, CausalOutput, CompatModel
from qwenkit.errors import UsageError
from qwenkit.merge import merge_folder
from qwenkit.parallel import GivenMap
from qwenkit.save import read_shard_size

_NAME = "default"
_KEY = 1


class CompatPeftModel(CompatModel):
    """A model that answers with an adapter; `merge_and_unload` makes one that needs none."""

    def __init__(self, llm: LLM, adapter: Path, options: dict[str, Any]) -> None:
        super().__init__(llm)
        self._adapter = adapter
        self._options = options
        llm.load_adapter(_NAME, adapter)
        llm.default_adapter = _NAME
        self._bank: AdapterBank | None = None

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> CausalOutput:
        """As `CompatModel.__call__`, with the adapter."""
        if self._bank is None:
            self._bank = AdapterBank(self.llm.model, native=False)
            self._bank.add(_KEY, self._bank.prepare(read_adapter(self._adapter)))
        every = [Segment(_KEY, 0, input_ids.numel())]
        self._bank.choose(every, every)
        return self._logits(self._bank.model, input_ids, attention_mask)

    def merge_and_unload(self) -> MergedModel:
        """A model with the adapter in its weights, loaded anew. Raises UsageError for a quantized
        model.
        """
        source = self.llm.path
        llm = LLM(source, merge=self._adapter, **self._options)
        self.llm.close()
        return MergedModel(llm, source, self._adapter)


class MergedModel(CompatModel):
    """A model with an adapter in its weights, which can be written."""

    def __init__(self, llm: LLM, source: Path, adapter: Path) -> None:
        super().__init__(llm)
        self._source = source
        self._adapter = adapter

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: str | int = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the model, with its tokenizer, template and generation config, as safetensors.

        Raises UsageError for another format, or a folder that cannot be written to.
        """
        if not safe_serialization:
            raise UsageError("safe_serialization: only safetensors are written; leave it True.")
        size = read_shard_size(max_shard_size)
        merge_folder(self._source, self._adapter, save_directory, shard_bytes=size)


class AutoPeftModelForCausalLM:
    """Loads an adapter, and with it the model that its config names."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        device_map: GivenMap | None = None,
        torch_dtype: torch.dtype | str | None = None,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
    ) -> CompatPeftModel:
        """The adapter in a folder, or on a hub, on its `base_model_name_or_path`; the switches are
        those of `AutoModelForCausalLM`. Raises UsageError when the config names no model.
        """
        adapter = resolve(str(pretrained_model_name_or_path), revision=revision)
        base = read_adapter(adapter).config.base_model
        if base is None:
            raise UsageError(
                f"{adapter}: adapter_config.json has no base_model_name_or_path. Load the model "
                "with LLM(…, adapters={name: path})."
            )
        model = AutoModelForCausalLM.from_pretrained(
            base, device_map=device_map, torch_dtype=torch_dtype
        )
        llm = model.llm
        placed = llm.devices
        place: GivenMap = placed if isinstance(placed, str) else placed.devices
        dtype = str(llm.model.dtype).removeprefix("torch.")
        return CompatPeftModel(llm, adapter, {"dtype": dtype, "device_map": place})
