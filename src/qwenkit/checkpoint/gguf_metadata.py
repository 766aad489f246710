"""The metadata of a GGUF to be written, from what a model folder says: the inverse of `gguf_model`.

Knows no model: a model's shape comes as a dictionary with the keys of `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwenkit.checkpoint.gguf_model import OPTIONAL, REQUIRED, ROPE_SCALING, SAMPLING, TOKEN_IDS
from qwenkit.checkpoint.gguf_write import TypedValue, Value

Metadata = dict[str, Value | TypedValue]
_TURN_ENDS = ("eos", "eot", "eom")  # roles of the ids that end an output, in the order of use


def shape_metadata(arch: str, config: Mapping[str, Any]) -> Metadata:
    """The keys of the architecture `arch` from `config`, whose missing keys are left out.

    `rope_scaling` is in the words of `config.json`.
    """
    found: Metadata = {}
    for key, ours in (REQUIRED | OPTIONAL).items():
        value = config.get(ours)
        if value is not None:
            found[f"{arch}.{key}"] = value
    if "head_dim" in config:
        found[f"{arch}.attention.value_length"] = config["head_dim"]
        found[f"{arch}.rope.dimension_count"] = config["head_dim"]
    scaling: Mapping[str, Any] = config.get("rope_scaling") or {}
    if scaling:
        found[f"{arch}.rope.scaling.type"] = scaling["rope_type"]
        for ours, key in {ours: key for key, ours in ROPE_SCALING.items()}.items():
            if scaling.get(ours) is not None:
                value = scaling[ours]
                found[f"{arch}.rope.scaling.{key}"] = value
    return found


def use_metadata(
    *,
    token_ids: Mapping[str, int | None],
    ends: Sequence[int],
    generation_config: Mapping[str, Any],
    chat_template: str | None,
    licence: str | None,
    add_bos_token: bool,
) -> Metadata:
    """The keys that say how the model is used: token ids by their role ("bos", "pad", "unk"), the
    ids that end an output (of more than three the first three), template and sampling defaults.
    """
    found: Metadata = {"tokenizer.ggml.add_bos_token": add_bos_token}
    for word, ours in TOKEN_IDS.items():
        token_id = token_ids.get(ours)
        if token_id is not None:
            found[f"tokenizer.ggml.{word}_token_id"] = token_id
    for word, end in zip(_TURN_ENDS, ends, strict=False):
        found[f"tokenizer.ggml.{word}_token_id"] = end
    if chat_template is not None:
        found["tokenizer.chat_template"] = chat_template
    if licence is not None:
        found["general.license"] = licence
    sampling = dict(generation_config)
    if sampling.get("do_sample") is False:
        sampling = {"temperature": 0.0, "repetition_penalty": sampling.get("repetition_penalty")}
    for key, ours in SAMPLING.items():
        value = sampling.get(ours)
        if value is not None:
            found[f"general.sampling.{key}"] = value if ours == "top_k" else float(value)
    return found
