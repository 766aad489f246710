"""Any loaded tokenizer written in any of the formats that hold it exactly.

The first generation's file has ranks and no merges; they are recovered token by token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer.bpe import Merge, Vocabulary, bytes_to_alphabet
from qwenkit.tokenizer.byte_pair import BytePairTokenizer
from qwenkit.tokenizer.extend import merge_of
from qwenkit.tokenizer.gguf import CONTROL, NORMAL, UNUSED, USER_DEFINED
from qwenkit.tokenizer.ranks import write_ranks
from qwenkit.tokenizer.reading import read_json
from qwenkit.tokenizer.tokenizer_json import pre_tokenizer_json

_CLASSES = {"qwen2": "Qwen2Tokenizer", "gpt-2": "GPT2Tokenizer", "smollm": "GPT2Tokenizer"}


def listed_merges(tokenizer: BytePairTokenizer) -> tuple[Merge, ...]:
    """The merges as (left id, right id, result id), best first; recovered where the vocabulary has
    ranks only (seconds for 150,000 tokens).

    Raises TokenizerError for a token that no merges lead to.
    """
    if tokenizer.vocabulary.merges is not None:
        return tokenizer.vocabulary.merges
    return tuple(
        merge_of(tokenizer.reference, token, rank, source="vocabulary")
        for token, rank in tokenizer.vocabulary.regular_ids().items()
        if len(token) > 1
    )


def to_tokenizer_json(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`. Raises TokenizerError where the format cannot say it."""
    vocabulary = tokenizer.vocabulary
    pre_tokenizer = pre_tokenizer_json(vocabulary.pre_tokenizer)
    if pre_tokenizer is None:
        name = vocabulary.pre_tokenizer.name
        raise TokenizerError(f"tokenizer.json cannot express the split pattern {name!r}.")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id} | _added_entry(vocabulary, text, token_id)
            for text, token_id in _by_id(vocabulary.control)
        ],
        "normalizer": None if vocabulary.normalization == "none" else {"type": "NFC"},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": byte_level | {"use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.merges is not None and vocabulary.whole_piece_first,
            "vocab": _vocab_json(vocabulary),
            "merges": _merge_lines(tokenizer),
        },
    }


def to_tokenizer_config(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """The keys of `tokenizer_config.json` that belong to the vocabulary: control tokens, class."""
    vocabulary = tokenizer.vocabulary
    decoder = {
        str(token_id): _added_entry(vocabulary, text, token_id)
        for text, token_id in _by_id(vocabulary.control)
    }
    kind = _CLASSES.get(vocabulary.pre_tokenizer.name, "PreTrainedTokenizerFast")
    return {"add_prefix_space": False, "added_tokens_decoder": decoder, "tokenizer_class": kind}


def to_gguf_metadata(
    tokenizer: BytePairTokenizer, *, vocab_rows: int | None = None
) -> dict[str, str | list[str] | list[int]]:
    """The keys `tokenizer.ggml.*` of a GGUF file: model, pre, tokens, token_type and merges.

    `vocab_rows` pads to the rows of the embedding with unused tokens. Raises TokenizerError when
    the vocabulary has more.
    """
    vocabulary = tokenizer.vocabulary
    rows = tokenizer.vocab_size if vocab_rows is None else vocab_rows
    if rows < tokenizer.vocab_size:
        raise TokenizerError(
            f"vocab_rows: got {rows}; the vocabulary has {tokenizer.vocab_size} ids."
        )
    _check_name_says_all(vocabulary)
    tokens = [f"[PAD{token_id}]" for token_id in range(rows)]
    types = [UNUSED] * rows
    for token, token_id in vocabulary.regular_ids().items():
        tokens[token_id], types[token_id] = bytes_to_alphabet(token), NORMAL
    for text, token_id in vocabulary.control.items():
        tokens[token_id] = text
        types[token_id] = CONTROL if token_id in vocabulary.special_ids else USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre_tokenizer.name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merge_lines(tokenizer),
    }


def _check_name_says_all(vocabulary: Vocabulary) -> None:
    """A GGUF file says how text is treated by one name; refuse what the name would get wrong."""
    name = vocabulary.pre_tokenizer.name
    composes = vocabulary.normalization != "none"
    whole = vocabulary.merges is not None and vocabulary.whole_piece_first
    if composes != (name == "qwen2") or whole != (name == "llama-bpe"):
        raise TokenizerError(
            f"a GGUF file cannot say that this vocabulary of kind {name!r} has normalization "
            f"{vocabulary.normalization!r} and ignore_merges {whole}; write tokenizer.json instead."
        )


def write_folder(tokenizer: BytePairTokenizer, folder: Path) -> list[Path]:
    """Write `vocab.json`, `merges.txt` and `tokenizer.json`, and the vocabulary's keys into
    `tokenizer_config.json`, whose other keys stay. Returns the files written.

    Raises TokenizerError where the formats cannot hold the vocabulary exactly.
    """
    content = to_tokenizer_json(tokenizer)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    config.pop("extra_vocab_file", None)  # its tokens are in the files written here
    texts = {
        "vocab.json": json.dumps(content["model"]["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *content["model"]["merges"], ""]),
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(
            config | to_tokenizer_config(tokenizer), ensure_ascii=False, indent=2
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in texts]


def write_tiktoken(tokenizer: BytePairTokenizer, path: Path) -> None:
    """Write the regular tokens as a .tiktoken file, which names no control tokens.

    Raises TokenizerError unless ids are merge ranks that start at 0.
    """
    regular = tokenizer.vocabulary.regular_ids()
    results = [result for _, _, result in tokenizer.vocabulary.merges or ()]
    if (
        list(regular.values()) != list(range(len(regular)))
        or results != sorted(results)
        or tokenizer.backend != "tiktoken"
    ):
        raise TokenizerError(
            f"{path}: ids of this vocabulary are not merge ranks from 0 on, which a .tiktoken file "
            "needs; write tokenizer.json instead."
        )
    write_ranks(path, regular)


def _merge_lines(tokenizer: BytePairTokenizer) -> list[str]:
    spelt = [bytes_to_alphabet(token) for token in tokenizer.vocabulary.tokens]
    return [f"{spelt[left]} {spelt[right]}" for left, right, _ in listed_merges(tokenizer)]


def _vocab_json(vocabulary: Vocabulary) -> dict[str, int]:
    regular = {bytes_to_alphabet(token): i for token, i in vocabulary.regular_ids().items()}
    # Readers number added tokens from the end of the vocabulary on, unless it holds them itself.
    control = _by_id(vocabulary.control)
    if [i for _, i in control] == list(range(len(regular), len(regular) + len(control))):
        return regular
    return dict(sorted({**regular, **vocabulary.control}.items(), key=lambda item: item[1]))


def _by_id(control: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(control.items(), key=lambda item: item[1])


def _added_entry(vocabulary: Vocabulary, text: str, token_id: int) -> dict[str, Any]:
    return {
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token_id in vocabulary.special_ids,
    }
