"""Readers of the files that tokenizers are published in.

`qwen.tiktoken` (first generation, `ranks.py`), `tokenizer.json`, and `vocab.json` with
`merges.txt`; `extra_vocab_file` adds tokens to any of them. Files are data: nothing in a folder is
executed, and what is not understood is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwenkit.errors import TokenizerError, suggest
from qwenkit.tokenizer.assemble import AddedToken, Parts, assemble
from qwenkit.tokenizer.bpe import PRE_TOKENIZERS, Vocabulary
from qwenkit.tokenizer.byte_pair import BytePairTokenizer
from qwenkit.tokenizer.extend import extended, with_extra_file
from qwenkit.tokenizer.ranks import read_ranks
from qwenkit.tokenizer.reading import read_json, read_text
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


def from_path(path: Path, *, extra_vocab_file: Path | None = None) -> BytePairTokenizer:
    """The tokenizer of a model folder, or of a `.tiktoken` or `tokenizer.json` file alone.

    Raises as `from_folder`.
    """
    if path.is_dir():
        return from_folder(path, extra_vocab_file=extra_vocab_file)
    if path.suffix == ".json":
        vocabulary = assemble(read_parts(str(path), read_json(path), ()))
        return BytePairTokenizer(with_extra_file(vocabulary, extra_vocab_file))
    if path.suffix == ".tiktoken":
        return from_tiktoken(path, extra_vocab_file=extra_vocab_file)
    raise TokenizerError(f"{path}: no vocabulary file; expected a .tiktoken or a tokenizer.json.")


def from_folder(
    folder: Path, *, pre_tokenizer: str | None = None, extra_vocab_file: Path | None = None
) -> BytePairTokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, else `vocab.json` with `merges.txt`, else
    `qwen.tiktoken`.

    `pre_tokenizer` names the split pattern for a vocab.json whose folder does not tell.
    `extra_vocab_file` adds tokens; without it, the file in the folder that tokenizer_config.json
    names under that key does. Raises TokenizerError naming the file and field that cannot be used,
    or the files looked for.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    added = _added_decoder(config_path, config)
    extra = extra_vocab_file or _named_extra(config_path, config)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        vocabulary = assemble(read_parts(str(path), read_json(path), added))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        name = pre_tokenizer or _pre_tokenizer_name(folder, config)
        vocabulary = _vocab_and_merges(folder, config, added, name)
    elif (folder / "qwen.tiktoken").is_file():
        vocabulary = _first_generation(folder / "qwen.tiktoken", added)
    else:
        other = " tokenizer.model is there, but SentencePiece vocabularies are not supported."
        raise TokenizerError(
            f"{folder}: no tokenizer found; looked for {_LOOKED_FOR}."
            + (other if (folder / "tokenizer.model").exists() else "")
        )
    return BytePairTokenizer(with_extra_file(vocabulary, extra))


def from_tiktoken(
    path: Path, *, release: Release = "current", extra_vocab_file: Path | None = None
) -> BytePairTokenizer:
    """The first generation's tokenizer from its `qwen.tiktoken`, to which the lines of an
    `extra_vocab_file` may have been appended.

    `release` "first" gives the control tokens the names they had in the very first release.
    """
    return BytePairTokenizer(with_extra_file(_ranked(path, release), extra_vocab_file))


def _ranked(path: Path, release: Release) -> Vocabulary:
    if release not in _CONTROL:
        raise TokenizerError(f"release: got {release!r}. {suggest(release, _CONTROL)}")
    names = _CONTROL[release]
    ranks = read_ranks(path, control_count=len(names))
    tokens = [token for i, (token, rank) in enumerate(ranks.items()) if rank == i]
    _check_bytes(path, tokens)
    control = {name: len(tokens) + i for i, name in enumerate(names)}
    vocabulary = Vocabulary(
        tokens=(*tokens, *(name.encode() for name in names)),
        control=control,
        special_ids=frozenset(control.values()),
        merges=None,
        pre_tokenizer=PRE_TOKENIZERS["qwen2"],
        normalization="text",
        whole_piece_first=True,
    )
    later = {token: rank for token, rank in ranks.items() if rank >= len(tokens)}
    return extended(vocabulary, later, source=str(path)) if later else vocabulary


def _check_bytes(path: Path, tokens: Sequence[bytes]) -> None:
    """Without a token for every byte, text would lose bytes and control ids lie too low."""
    single = {token for token in tokens if len(token) == 1}
    missing = [value for value in range(256) if bytes([value]) not in single]
    if missing:
        raise TokenizerError(
            f"{path}: {len(missing)} of the 256 tokens of one byte are missing, the first of them "
            f"0x{missing[0]:02x}; the file is damaged or incomplete. Fetch it again."
        )


def _first_generation(path: Path, added: Sequence[AddedToken]) -> Vocabulary:
    vocabulary = _ranked(path, "current")
    for token in added:
        if vocabulary.control.get(token.text) != token.token_id:
            raise TokenizerError(
                f"{path}: tokenizer_config.json beside it gives id {token.token_id} to "
                f"{token.text!r}, which the first generation does not: these files are of "
                "different generations. Take all of them from one release."
            )
    return vocabulary


def _named_extra(config_path: Path, config: Mapping[str, Any]) -> Path | None:
    name = config.get("extra_vocab_file")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise TokenizerError(
            f"{config_path}: extra_vocab_file: got {str(name)[:60]!r}; expected the name of a file "
            "in the same folder."
        )
    return config_path.parent / name


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
