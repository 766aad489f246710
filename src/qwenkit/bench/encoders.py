"""Tokenizers to measure, by name: ours for any model or vocabulary file, and those of other
packages.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.checkpoint.hub import resolve
from qwenkit.checkpoint.vocabulary import open_tokenizer
from qwenkit.errors import MissingDependencyError, UsageError, suggest
from qwenkit.tokenizer import BytePairTokenizer, to_tokenizer_json, write_folder
from qwenkit.tokenizer.fast import proven_ranks

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer that takes text to ids and reads no control tokens in it."""

    name: str
    encode: Encode


def open_encoder(name: str) -> Encoder:
    """The tokenizer called `name`: a model, a folder or a vocabulary file for ours; with
    "tokenizers:FILE", "transformers:MODEL" or "tiktoken:ENCODING" that package's.

    Raises MissingDependencyError for a package that is not installed, UsageError for what it cannot
    open, and what `resolve` and `open_tokenizer` raise.
    """
    package, colon, what = name.partition(":")
    if not colon or package not in _PACKAGES:
        return Encoder(name, open_tokenizer(resolve(name)).encode)
    module = _import(package)
    try:
        return Encoder(name, _PACKAGES[package](module, what))
    except Exception as error:  # each package has exceptions of its own, some of them bare
        raise UsageError(f"tokenizer: {name!r} cannot be opened: {error}") from error


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(package, "bench", f"comparing with {package}") from error


def _tokenizers(module: Any, file: str) -> Encode:
    tokenizer = module.Tokenizer.from_file(file)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _transformers(module: Any, model: str) -> Encode:
    tokenizer = module.AutoTokenizer.from_pretrained(model)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _tiktoken(module: Any, encoding: str) -> Encode:
    return module.get_encoding(encoding).encode_ordinary  # type: ignore[no-any-return]


_PACKAGES: Mapping[str, Callable[[Any, str], Encode]] = {
    "tokenizers": _tokenizers,
    "transformers": _transformers,
    "tiktoken": _tiktoken,
}


def peer_of(tokenizer: BytePairTokenizer, peer: str) -> Encoder:
    """Another package over the vocabulary of `tokenizer`; "quicktok" over the Qwen vocabulary that
    it brings.

    Raises UsageError for an unknown name, a package that is not installed, and a vocabulary that
    it cannot hold.
    """
    if peer not in _PEERS:
        raise UsageError(f"peer: got {peer!r}. {suggest(peer, _PEERS)}")
    module = peer.replace("-", "_")
    try:
        return Encoder(peer, _PEERS[peer](importlib.import_module(module), tokenizer))
    except ImportError as error:
        raise UsageError(
            f"peer: {peer} cannot be imported ({error}). Install it with: pip install "
            f"{PEER_PACKAGES[peer]}"
        ) from error


def _tiktoken_peer(module: Any, tokenizer: BytePairTokenizer) -> Encode:
    ranks, pattern = proven_ranks(tokenizer.reference), tokenizer.vocabulary.pre_tokenizer.single
    if ranks is None or not ranks.items() <= tokenizer.reference.regular.items():
        raise UsageError("peer: tiktoken cannot hold this vocabulary: its ids are no ranks.")
    encoding = module.Encoding("peer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary  # type: ignore[no-any-return]


def _tokenizers_peer(module: Any, tokenizer: BytePairTokenizer) -> Encode:
    content = to_tokenizer_json(tokenizer) | {"added_tokens": []}
    own = module.Tokenizer.from_str(json.dumps(content))
    return lambda text: own.encode(text, add_special_tokens=False).ids


def _bpe_qwen_peer(module: Any, tokenizer: BytePairTokenizer) -> Encode:
    with tempfile.TemporaryDirectory(prefix="qwenkit-bench-") as folder:
        write_folder(tokenizer, Path(folder))
        return module.QwenTokenizer(folder).encode  # type: ignore[no-any-return]


def _quicktok_peer(module: Any, tokenizer: BytePairTokenizer) -> Encode:
    return module.get_encoding("qwen3").encode_ordinary  # type: ignore[no-any-return]


_PEERS: Mapping[str, Callable[[Any, BytePairTokenizer], Encode]] = {
    "tiktoken": _tiktoken_peer,
    "tokenizers": _tokenizers_peer,
    "bpe-qwen": _bpe_qwen_peer,
    "quicktok": _quicktok_peer,
}
PEER_PACKAGES: Mapping[str, str] = {peer: peer for peer in _PEERS} | {"quicktok": "quicktok-v1"}
