"""Readers of the files that tokenizers are published in.

`qwen.tiktoken` (first generation: one base64 token and its rank a line), `tokenizer.json`, and
 `vocab.json` with `merges.txt`. Files are data: nothing in a folder is executed, and what is not
understood is refused, never guessed.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwenkit.errors import TokenizerError, suggest
from qwenkit.tokenizer.assemble import AddedToken, Parts, assemble
from qwenkit.tokenizer.bpe import PRE_TOKENIZERS, Vocabulary
from qwenkit.tokenizer.byte_pair import BytePairTokenizer
from qwenkit.tokenizer.reading import read_bytes, read_json, read_text
from qwenkit.tokenizer.tokenizer_json import added_token, read_parts

Release = Literal["current", "first"]

_LOOKED_FOR = "tokenizer.json, vocab.json with merges.txt, qwen.tiktoken"
_TURN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CONTROL: Mapping[Release, tuple[str, ...]] = {
    "current": (*_TURN, *(f"<|extra_{i}|>" for i in range(205))),
    "first": (
        *_TURN,
        *("<R>", "<S>", "<X>", "<mask>", "<sep>"),
        *(f"<extra_{i}>" for i in range(200)),
    ),
}


def from_folder(folder: Path, *, pre_tokenizer: str | None = None) -> BytePairTokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, else `vocab.json` with `merges.txt`, else
    `qwen.tiktoken`.

    `pre_tokenizer` names the split pattern for a vocab.json whose folder does not tell. Raises
    TokenizerError naming the file and field that cannot be used, or the files looked for.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    added = _added_decoder(config_path, config)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        return BytePairTokenizer(assemble(read_parts(str(path), read_json(path), added)))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        name = pre_tokenizer or _pre_tokenizer_name(folder, config)
        return BytePairTokenizer(_vocab_and_merges(folder, config, added, name))
    if (folder / "qwen.tiktoken").is_file():
        return _first_generation(folder / "qwen.tiktoken", added)
    other = " tokenizer.model is there, but SentencePiece vocabularies are not supported."
    raise TokenizerError(
        f"{folder}: no tokenizer found; looked for {_LOOKED_FOR}."
        + (other if (folder / "tokenizer.model").exists() else "")
    )


def from_tiktoken(path: Path, *, release: Release = "current") -> BytePairTokenizer:
    """The first generation's tokenizer from its `qwen.tiktoken`.

    `release` "first" gives the control tokens the names they had in the very first release.
    """
    if release not in _CONTROL:
        raise TokenizerError(f"release: got {release!r}. {suggest(release, _CONTROL)}")
    tokens = _ranked_tokens(path)
    names = _CONTROL[release]
    control = {name: len(tokens) + i for i, name in enumerate(names)}
    return BytePairTokenizer(
        Vocabulary(
            tokens=(*tokens, *(name.encode() for name in names)),
            control=control,
            special_ids=frozenset(control.values()),
            merges=None,
            pre_tokenizer=PRE_TOKENIZERS["qwen2"],
            normalization="text",
            whole_piece_first=True,
        )
    )


def _first_generation(path: Path, added: Sequence[AddedToken]) -> BytePairTokenizer:
    tokenizer = from_tiktoken(path)
    for token in added:
        if tokenizer.control_tokens.get(token.text) != token.token_id:
            raise TokenizerError(
                f"{path}: tokenizer_config.json beside it gives id {token.token_id} to "
                f"{token.text!r}, which the first generation does not: these files are of "
                "different generations. Take all of them from one release."
            )
    return tokenizer


def _ranked_tokens(path: Path) -> list[bytes]:
    tokens: list[bytes] = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            spelt, rank = line.split()
            token = binascii.a2b_base64(spelt, strict_mode=True)
            if int(rank) != len(tokens) or not token:
                raise ValueError
        except ValueError:
            raise TokenizerError(
                f"{path}: line {number}: expected a base64 token and its rank {len(tokens)}, got "
                f"{line[:60]!r}."
            ) from None
        tokens.append(token)
    if len(set(tokens)) != len(tokens) or not tokens:
        raise TokenizerError(
            f"{path}: {len(tokens)} tokens, {len(set(tokens))} different ones; every token must be "
            "listed exactly once."
        )
    return tokens


def _added_decoder(path: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """The control tokens in `tokenizer_config.json`: id as text → token."""
    items = config.get("added_tokens_decoder") or {}
    if not isinstance(items, dict) or not all(key.isdecimal() and len(key) < 10 for key in items):
        raise TokenizerError(
            f"{path}: added_tokens_decoder: expected an object from ids to tokens, got "
            f"{str(items)[:60]}."
        )
    return [
        added_token(f"{path}: added_tokens_decoder[{key}]", item, int(key))
        for key, item in items.items()
    ]


def _with_added_json(
    folder: Path, config: Mapping[str, Any], added: Sequence[AddedToken]
) -> list[AddedToken]:
    """`added` and what `added_tokens.json` (text → id) names beyond them. That file does not say
    which tokens are special; those that have a role in the other files are.
    """
    path, roles_path = folder / "added_tokens.json", folder / "special_tokens_map.json"
    if not path.is_file():
        return [*added]
    known = {token.token_id for token in added}
    special = _roles(config) | (_roles(read_json(roles_path)) if roles_path.is_file() else set())
    return [*added] + [
        AddedToken(token_id, text, special=text in special)
        for text, token_id in read_json(path).items()
        if token_id not in known
    ]


def _roles(config: Mapping[str, Any]) -> set[str]:
    """Texts of the tokens that have a role, such as `eos_token` or `additional_special_tokens`."""
    values = [value for key, value in config.items() if key.endswith(("_token", "_tokens"))]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    texts = [item.get("content") if isinstance(item, dict) else item for item in flat]
    return {text for text in texts if isinstance(text, str)}


def _vocab_and_merges(
    folder: Path,
    config: Mapping[str, Any],
    added: Sequence[AddedToken],
    pre_tokenizer: str,
) -> Vocabulary:
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"pre_tokenizer: got {pre_tokenizer!r}. {suggest(pre_tokenizer, PRE_TOKENIZERS)}"
        )
    merges_path = folder / "merges.txt"
    lines = read_text(merges_path).split("\n")
    if lines and lines[0].startswith("#version"):
        del lines[0]
    return assemble(
        Parts(
            source=str(folder / "vocab.json"),
            regular=read_json(folder / "vocab.json"),
            merges=[line.rstrip("\r") for line in lines if line.strip()],
            added=_with_added_json(folder, config, added),
            pre_tokenizer=PRE_TOKENIZERS[pre_tokenizer],
            normalization="segments" if pre_tokenizer == "qwen2" else "none",
            whole_piece_first=pre_tokenizer == "llama-bpe",
        )
    )


def _pre_tokenizer_name(folder: Path, config: Mapping[str, Any]) -> str:
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        return "qwen2" if kind == "Qwen2Tokenizer" else "gpt-2"
    path = folder / "config.json"
    model = str(read_json(path).get("model_type", "")) if path.is_file() else ""
    if not kind and (model.startswith("qwen") or model == "gpt2"):
        return "qwen2" if model.startswith("qwen") else "gpt-2"
    raise TokenizerError(
        f"{folder}: vocab.json does not say how text is split, and neither tokenizer_config.json "
        f"(tokenizer_class {kind!r}) nor config.json (model_type {model!r}) does. Pass "
        f"pre_tokenizer=; allowed: {', '.join(PRE_TOKENIZERS)}."
    )
