"""`BitsAndBytesConfig` of the published snippets: how weights are rounded while loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwenkit.errors import UsageError, suggest

QUANT_TYPES = ("fp4", "nf4")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class BitsAndBytesConfig:
    """Four bits, NF4 or FP4, or LLM.int8; the package bitsandbytes is not needed.

    `bnb_4bit_compute_dtype` is that of activations where nothing else says so, on an accelerator; a
    processor computes in what suits it. Embedding, head and routers are never quantized.
    `llm_int8_threshold` has no effect: activations that stand out are kept in fifteen bits, however
    large they are. Neither have `llm_int8_enable_fp32_cpu_offload` and `bnb_4bit_quant_storage`.
    Raises UsageError for a contradiction or an unknown type.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: Sequence[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        if self.load_in_4bit is self.load_in_8bit:
            raise UsageError("quantization_config: set one of load_in_4bit and load_in_8bit.")
        if self.bnb_4bit_quant_type not in QUANT_TYPES:
            given = self.bnb_4bit_quant_type
            raise UsageError(
                f"bnb_4bit_quant_type: got {given!r}. {suggest(str(given), QUANT_TYPES)}"
            )
        if self.compute_dtype not in (None, *_DTYPES):
            given = self.compute_dtype or ""
            raise UsageError(f"bnb_4bit_compute_dtype: got {given!r}. {suggest(given, _DTYPES)}")
        if set(self.llm_int8_skip_modules or ()) - {"lm_head"}:
            raise UsageError(
                f"llm_int8_skip_modules: got {self.llm_int8_skip_modules!r}; only lm_head, which "
                "is never quantized, can be named."
            )
        if self.llm_int8_has_fp16_weight:
            raise UsageError("llm_int8_has_fp16_weight: only False is supported.")

    @property
    def compute_dtype(self) -> str | None:
        """The name of `bnb_4bit_compute_dtype`."""
        given = self.bnb_4bit_compute_dtype
        return None if given is None else str(given).removeprefix("torch.")

    @property
    def weights(self) -> str:
        """The kind of weights, as `qwenkit.LLM` names it."""
        if self.load_in_8bit:
            return "llm-int8"
        return self.bnb_4bit_quant_type + ("-double" if self.bnb_4bit_use_double_quant else "")


def read_config(
    given: Any, load_in_8bit: bool | None, load_in_4bit: bool | None
) -> BitsAndBytesConfig | None:
    """The config that the arguments of `from_pretrained` make; None where nothing is asked for.

    `given` may be the class of this name of transformers as well, or a mapping of its fields.
    Raises UsageError for anything else.
    """
    if load_in_8bit or load_in_4bit:
        if given is not None:
            raise UsageError("load_in_4bit, load_in_8bit: say it in quantization_config instead.")
        return BitsAndBytesConfig(bool(load_in_8bit), bool(load_in_4bit))
    if given is None or isinstance(given, BitsAndBytesConfig):
        return given
    fields = given if isinstance(given, dict) else getattr(given, "to_dict", dict)()
    method = fields.get("quant_method", "bitsandbytes")
    if "load_in_4bit" not in fields or str(getattr(method, "value", method)) != "bitsandbytes":
        raise UsageError(
            f"quantization_config: got {type(given).__name__}; while loading, weights are rounded "
            "as a BitsAndBytesConfig says. GPTQ and AWQ files need none: they say what they are."
        )
    known = BitsAndBytesConfig.__dataclass_fields__
    return BitsAndBytesConfig(**{name: fields[name] for name in known if name in fields})
