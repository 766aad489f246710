"""The tokenizer in a GGUF file's metadata.

The keys are those of the GGUF specification (ggml-org/ggml, docs/gguf.md): tokens in GPT-2's
printable alphabet, a type for each, merges, and the name of the split pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenkit.errors import TokenizerError, suggest
from qwenkit.tokenizer.assemble import AddedToken, Parts, assemble
from qwenkit.tokenizer.bpe import PRE_TOKENIZERS
from qwenkit.tokenizer.byte_pair import BytePairTokenizer
from qwenkit.tokenizer.extend import with_extra_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_TYPES = {
    NORMAL: "normal",
    UNKNOWN: "unknown",
    CONTROL: "control",
    USER_DEFINED: "user defined",
    UNUSED: "unused",
}
# Names that writers of GGUF files give to the split patterns that are known here.
_PATTERNS = {name: name for name in PRE_TOKENIZERS} | {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}


def from_gguf(
    metadata: Mapping[str, Any], *, extra_vocab_file: Path | None = None
) -> BytePairTokenizer:
    """The tokenizer in a GGUF file's metadata (keys `tokenizer.ggml.*`), with the tokens of
    `extra_vocab_file` if given.

    Raises TokenizerError naming the key that is missing or cannot be used.
    """
    source = "GGUF metadata"
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"{source}: tokenizer.ggml.model: got {kind!r}; qwenkit reads 'gpt2' (byte-level BPE)."
        )
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PATTERNS:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.pre: got {name!r}, so it is not known how text is split. "
            f"{suggest(str(name), _PATTERNS)}"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise TokenizerError(
            f"{source}: tokenizer.ggml.add_space_prefix: got True; only False is supported."
        )
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int)
    merges = _list(metadata, "merges", str)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"{source}: tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens."
        )
    for token_id, code in enumerate(types):
        if code not in _TYPES:
            allowed = ", ".join(f"{c} ({n})" for c, n in _TYPES.items())
            raise TokenizerError(
                f"{source}: tokenizer.ggml.token_type[{token_id}]: got {code}; allowed: {allowed}."
            )
    _check_unique(f"{source}: tokenizer.ggml.tokens", tokens)
    vocabulary = assemble(
        Parts(
            source=source,
            regular={t: i for i, t in enumerate(tokens) if types[i] != UNUSED},
            merges=merges,
            added=[
                AddedToken(i, t, special=types[i] != USER_DEFINED)
                for i, t in enumerate(tokens)
                if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
            ],
            pre_tokenizer=PRE_TOKENIZERS[_PATTERNS[name]],
            normalization="segments" if name == "qwen2" else "none",
            whole_piece_first=_PATTERNS[name] == "llama-bpe",
        )
    )
    return BytePairTokenizer(with_extra_file(vocabulary, extra_vocab_file))


def _list(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if value is None or isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise TokenizerError(
            f"GGUF metadata: {key}: expected a list, got {type(value).__name__}; the file is "
            "incomplete or was written for another kind of tokenizer."
        )
    items = list(value)
    if kind is int:
        items = [int(item) if hasattr(item, "__index__") else item for item in items]
    for i, item in enumerate(items):
        if type(item) is not kind:
            raise TokenizerError(
                f"GGUF metadata: {key}[{i}]: expected {kind.__name__}, got {type(item).__name__}."
            )
    return items


def _check_unique(where: str, tokens: Sequence[str]) -> None:
    if len(set(tokens)) == len(tokens):
        return
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token in seen:
            raise TokenizerError(f"{where}: {token!r} is listed twice, as {seen[token]} and {i}.")
        seen[token] = i
