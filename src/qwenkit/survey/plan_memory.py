"""How much memory a model takes that serves some users: the formula, all of it in this file.

    running = process + weights + keys and values + activations
    loading = process + what is packed already + the module at hand and its pages of the file

`process` is Python, its libraries and the tokenizer, measured and not computed. Figures are those
of the native kernels with activations in fp32, and of resident memory: anonymous pages, and pages
of files that were touched. The engine's constants are repeated here because rooms beside each other
do not import each other; a test holds them equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenkit.errors import UsageError, suggest
from qwenkit.kernels import kv_int4
from qwenkit.models.spec import ModelConfig
from qwenkit.survey.plan_weights import Weights

BLOCK_TOKENS = 16
STEP_TOKENS = 512  # the most that one step computes of a prompt
MOST_USERS = 64  # that run at the same time; more wait
KV_KINDS = ("auto", "fp32", "bf16", "int8", "int4")
# What the engine keeps them in by itself, where products round activations and where they do not.
AUTO_KV = {True: "bf16", False: "fp32"}

_FLOAT_BYTES = 4
# Results from one size on are kept in huge pages, as `kernels/cpu/memory.py` says.
_LARGE_BYTES = _HUGE_PAGE_BYTES = 2 << 20
_RECORDED_USERS = 16  # up to which a decoding step is recorded and keeps all that it makes
_PANEL_ROWS = 32  # that a thread takes apart at a time
_SCALES_PER_GROUP = 7  # and offsets, sums and places, of activations rounded twice
# What malloc keeps for what is live at a time: pieces of a step's sizes leave gaps between them.
# Measured with glibc on a Qwen2-0.5B.
_KEPT = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of a model: `users` at the same time, each with `tokens` of prompt and answer
    together, keys and values kept as `kv_dtype` ("auto": what the engine takes), on `threads`.
    """

    users: int = 1
    tokens: int = 4096
    kv_dtype: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("users", "tokens", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}; at least 1 is needed.")
        if self.kv_dtype not in KV_KINDS:
            raise UsageError(f"kv_dtype: got {self.kv_dtype!r}. {suggest(self.kv_dtype, KV_KINDS)}")
        if self.users > MOST_USERS:
            raise UsageError(
                f"users: got {self.users}; one engine runs at most {MOST_USERS} at the same time, "
                "the others wait."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that are resident. `loading_bytes` is the most while the model is loaded."""

    process_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    loading_bytes: int

    @property
    def running_bytes(self) -> int:
        """While the users are served, all at their last token."""
        return self.process_bytes + self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.running_bytes, self.loading_bytes)


def estimate(
    config: ModelConfig, weights: Weights, work: Workload, *, process_bytes: int
) -> Memory:
    """The memory of a model of these shapes and weights under `work`."""
    return Memory(
        process_bytes=process_bytes,
        weight_bytes=weights.held_bytes,
        kv_bytes=kv_bytes(config, weights, work),
        activation_bytes=activation_bytes(config, weights, work),
        loading_bytes=process_bytes + weights.loading_bytes,
    )


def kv_bytes(config: ModelConfig, weights: Weights, work: Workload) -> int:
    """Keys and values of all users' tokens in all layers, in whole blocks."""
    kind = AUTO_KV[weights.rounds] if work.kv_dtype == "auto" else work.kv_dtype
    per_head = kv_head_bytes(kind, config.head_dim)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * per_head
    return work.users * -(-work.tokens // BLOCK_TOKENS) * BLOCK_TOKENS * per_token


def kv_head_bytes(kind: str, head_dim: int) -> int:
    """Bytes of one head of one token's keys or values. int8 and int4 are the least that it can
    be: layers whose keys have outliers are kept in more bits.
    """
    if kind == "int4":
        return kv_int4.row_bytes(head_dim)
    if kind == "int8":
        return head_dim + _FLOAT_BYTES  # a scale for each head of a token
    return head_dim * {"fp32": 4, "bf16": 2}[kind]


def activation_bytes(config: ModelConfig, weights: Weights, work: Workload) -> int:
    """What is computed with: results of one layer at the largest step, the kernels' scratch memory,
    and what recorded decoding steps keep.
    """
    mlp, hidden = weights.mlp_width, config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    step = min(work.users * work.tokens, STEP_TOKENS)
    # Results of products: the feed-forward part, input and sum of a layer, queries, keys, values.
    gates = 3 if weights.is_mixture else 1  # experts have no product that gates at once
    results = [mlp] * gates + [hidden, hidden, queries, keys, keys]
    sizes = [step * width * _FLOAT_BYTES for width in results]
    large = sum(-(-s // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES for s in sizes if s >= _LARGE_BYTES)
    small = sum(size for size in sizes if size < _LARGE_BYTES)
    rotated = 2 * step * queries * _FLOAT_BYTES  # and what attention makes of them
    groups = mlp // weights.group if weights.group else 0
    rounded = step * (3 * mlp + _SCALES_PER_GROUP * groups * _FLOAT_BYTES)
    scratch = rounded + work.threads * _PANEL_ROWS * mlp
    logits = work.users * config.vocab_size * _FLOAT_BYTES
    # One recording for each number of users, as they leave; it fills the gaps first.
    most = 0 if weights.is_mixture else min(work.users, _RECORDED_USERS)
    per_token = config.num_hidden_layers * (mlp + 2 * hidden + 2 * queries + 2 * keys)
    recorded = most * (most + 1) // 2 * (per_token + config.vocab_size) * _FLOAT_BYTES
    heap = small + rotated + scratch
    return large + max(int(_KEPT * heap), heap + recorded) + logits
