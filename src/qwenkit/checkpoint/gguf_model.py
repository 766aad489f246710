"""What a GGUF's metadata mean, in the words of a Hugging Face model folder.

The keys are those of the GGUF specification and hold for every architecture; the result has the
keys of `config.json`, so that whoever builds models knows one layout only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenkit.checkpoint.gguf import read_gguf
from qwenkit.checkpoint.members import clip
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.errors import CheckpointError

MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}  # where GGUF's spelling differs

REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.max_alibi_bias": "max_alibi_bias",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    # ours, for GGUF has none: how the first Qwen goes beyond its trained length
    "seq_length": "seq_length",
    "use_dynamic_ntk": "use_dynamic_ntk",
    "use_logn_attn": "use_logn_attn",
}
_IMPLIED: Mapping[str, Mapping[str, Any]] = {  # what the architecture's name says, and no key
    "qwen2moe": {"norm_topk_prob": False},
    "qwen3moe": {"norm_topk_prob": True},
}
ROPE_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
TOKEN_IDS = {  # GGUF's word → Hugging Face's
    "bos": "bos",
    "eos": "eos",
    "padding": "pad",
    "unknown": "unk",
}
_FRACTIONS = frozenset(
    {"rms_norm_eps", "layer_norm_epsilon", "rope_theta", "factor", "attention_factor"}
    | {"max_alibi_bias"}
    | {"beta_fast", "beta_slow", "temperature", "top_p", "min_p", "repetition_penalty"}
)
_FLAGS = frozenset(
    {"norm_topk_prob", "add_bos_token", "add_eos_token", "use_dynamic_ntk", "use_logn_attn"}
)


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF as a checkpoint. Raises CheckpointError naming the file and the key."""
    gguf = read_gguf(file)
    reading = _Reading(file, gguf.metadata, gguf.tensors)
    ids = reading.token_ids()
    shared = {f"{word}_token_id": i for word, i in ids.items() if word in ("bos", "eos", "pad")}
    return Checkpoint(
        name=file.stem,
        path=file,
        container="gguf",
        config=reading.config() | shared,
        tensors=gguf.tensors,
        generation_config=reading.sampling() | shared | reading.all_eos(),
        tokenizer_config=reading.tokenizer_config(ids),
        chat_template=reading.text("tokenizer.chat_template"),
        licence=reading.text("general.license.name") or reading.text("general.license"),
        gguf_metadata=gguf.metadata,
    )


class _Reading:
    """One file's metadata, with every value checked for its kind when it is asked for."""

    def __init__(
        self, file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> None:
        self.file = file
        self.metadata = metadata
        self.tensors = tensors
        architecture = self.text("general.architecture")
        if not architecture:
            raise CheckpointError(file, "general.architecture", "is missing; it names the model.")
        self.architecture = architecture

    def config(self) -> dict[str, Any]:
        """The keys of `config.json`, as far as the file says."""
        name = self.architecture
        config: dict[str, Any] = {"model_type": MODEL_TYPES.get(name, name)}
        config |= _IMPLIED.get(name, {})
        for key, ours in REQUIRED.items():
            value = self._value(f"{name}.{key}", ours)
            if value is None:
                raise CheckpointError(self.file, f"{name}.{key}", "is missing; the model needs it.")
            config[ours] = value
        for key, ours in OPTIONAL.items():
            value = self._value(f"{name}.{key}", ours)
            if value is not None:
                config[ours] = value
        if "rms_norm_eps" not in config and "layer_norm_epsilon" not in config:
            key = f"{name}.attention.layer_norm_rms_epsilon"
            raise CheckpointError(self.file, key, "is missing; the model needs it.")
        config |= self._experts(config)
        config |= self._rope_scaling()
        config["vocab_size"] = self._vocabulary_rows()
        config["tie_word_embeddings"] = "output.weight" not in self.tensors
        config["attention_bias"] = "blk.0.attn_output.bias" in self.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        config |= self._baichuan(config)
        if config.get("sliding_window"):
            config["use_sliding_window"] = True
        return config

    def _experts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the tensors say of a mixture: which layers have no experts, and sizes that older
        converters left out.
        """
        layers = range(config["num_hidden_layers"])
        if not config.get("num_experts") or len(layers) > len(self.tensors):  # a damaged number
            return {}
        dense = [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in self.tensors]
        found: dict[str, Any] = {"mlp_only_layers": dense}
        first = next((i for i in layers if i not in dense), 0)
        for key, tensor in (
            ("moe_intermediate_size", f"blk.{first}.ffn_gate_exps.weight"),
            ("shared_expert_intermediate_size", f"blk.{first}.ffn_gate_shexp.weight"),
        ):
            if key not in config and tensor in self.tensors and len(self.tensors[tensor].shape) > 1:
                found[key] = self.tensors[tensor].shape[-2]
        return found

    def _baichuan(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What tells the 13B from the rotary 7B, and the second generation from the first, whose
        head is plain: files of other converters say neither, so it is llama.cpp's sign for the one,
        40 layers, and the number of rows for the other.
        """
        alibi = "max_alibi_bias" in config or config["num_hidden_layers"] == 40
        if self.architecture != "baichuan" or not alibi:
            return {}
        found = {
            "max_position_embeddings": None,
            "model_max_length": config["max_position_embeddings"],
        }
        return found | ({} if config["vocab_size"] == 64_000 else {"z_loss_weight": 0})

    def _rope_scaling(self) -> dict[str, Any]:
        prefix = f"{self.architecture}.rope.scaling"
        kind = self.text(f"{prefix}.type")
        if kind in (None, "none"):
            return {}
        scaling: dict[str, Any] = {"rope_type": kind}
        for key, ours in ROPE_SCALING.items():
            value = self._value(f"{prefix}.{key}", ours)
            if value is not None:
                scaling[ours] = value
        return {"rope_scaling": scaling}

    def _vocabulary_rows(self) -> int:
        """Rows of the embedding, which may be more than there are tokens."""
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                self.file, "token_embd.weight", "the embedding is missing or no matrix."
            )
        return embedding.shape[0]

    def sampling(self) -> dict[str, Any]:
        """The model's own sampling defaults, under the keys of `generation_config.json`."""
        values = {ours: self._value(f"general.sampling.{k}", ours) for k, ours in SAMPLING.items()}
        return {key: value for key, value in values.items() if value is not None}

    def token_ids(self) -> dict[str, int]:
        """Ids of the tokens with a role, by Hugging Face's short name ("bos", "eos", …)."""
        ids = {ours: self._token_id(word) for word, ours in TOKEN_IDS.items()}
        return {word: i for word, i in ids.items() if i is not None}

    def all_eos(self) -> dict[str, Any]:
        """Every id that ends an output, a list when a turn has an end of its own."""
        found = (self._token_id(word) for word in ("eos", "eot", "eom"))
        ids = list(dict.fromkeys(i for i in found if i is not None))
        return {"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {}

    def tokenizer_config(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """Keys of `tokenizer_config.json`: ids, the tokens' texts, whether one is put in front."""
        config: dict[str, Any] = {f"{word}_token_id": i for word, i in ids.items()}
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list):
            config |= {f"{word}_token": tokens[i] for word, i in ids.items()}
        for key in ("add_bos_token", "add_eos_token"):
            value = self._value(f"tokenizer.ggml.{key}", key)
            if value is not None:
                config[key] = value
        return config

    def _token_id(self, word: str) -> int | None:
        key = f"tokenizer.ggml.{word}_token_id"
        value = self._value(key, "")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if value is not None and isinstance(tokens, list) and value >= len(tokens):
            raise CheckpointError(self.file, key, f"got {value}; there are {len(tokens)} tokens.")
        return value if isinstance(value, int) else None

    def text(self, key: str) -> str | None:
        """A text, None where there is none. Raises CheckpointError for anything else."""
        value = self.metadata.get(key)
        if value is None or isinstance(value, str):
            return value
        raise CheckpointError(self.file, key, f"expected text, got {clip(value)}.")

    def _value(self, key: str, ours: str) -> Any:
        """A number, or one flag, of the kind that the key `ours` has; None where there is none.

        Some files give one number a layer; all must agree, for we know no such model.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if ours in _FLAGS:
            right, kind = isinstance(value, bool), "true or false"
        elif ours in _FRACTIONS:
            right = isinstance(value, int | float) and not isinstance(value, bool)
            kind = "a number"
        else:
            right = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            kind = "a whole number from 0 up"
        if not right:
            raise CheckpointError(self.file, key, f"expected {kind}, got {clip(value)}.")
        return value
