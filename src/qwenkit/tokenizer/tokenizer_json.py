"""`tokenizer.json` as published with Qwen2 and its relatives: read into a vocabulary, and written.

The file describes a pipeline; only the byte-level BPE pipelines whose every part is known here are
taken, since a part that is passed over changes ids without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer.assemble import AddedToken, Parts
from qwenkit.tokenizer.bpe import PRE_TOKENIZERS, Normalization, PreTokenizer
from qwenkit.tokenizer.reading import member, merge_lines

_DIGITS, _BYTE_LEVEL = PRE_TOKENIZERS["smollm"].stages
_BY_STAGES = {known.stages: known for known in PRE_TOKENIZERS.values()}
_MUST_BE_UNSET = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)


def read_parts(source: str, content: Mapping[str, Any], extra: Sequence[AddedToken]) -> Parts:
    """The parts of a parsed `tokenizer.json`; `extra` are added tokens named elsewhere, used where
    the file itself does not name them.

    Raises TokenizerError naming the field that is missing or not supported.
    """
    model = member(source, "", content, "model", dict)
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{source}: model.type: got {model['type']!r}; supported: 'BPE'.")
    for name in _MUST_BE_UNSET:
        if model.get(name):
            raise TokenizerError(
                f"{source}: model.{name}: got {model[name]!r}; byte-level BPE has none."
            )
    decoder = content.get("decoder")
    if decoder is not None and (
        not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel"
    ):
        raise TokenizerError(f"{source}: decoder: got {str(decoder)[:60]}; supported: ByteLevel.")
    merges = member(source, "model.", model, "merges", list)
    listed = member(source, "", content, "added_tokens", list) if "added_tokens" in content else []
    added = [
        added_token(f"{source}: added_tokens[{i}]", item, None) for i, item in enumerate(listed)
    ]
    known = {token.token_id for token in added}
    return Parts(
        source=source,
        regular=member(source, "model.", model, "vocab", dict),
        merges=merge_lines(f"{source}: model.merges", merges),
        added=added + [token for token in extra if token.token_id not in known],
        pre_tokenizer=_pre_tokenizer(source, content.get("pre_tokenizer")),
        normalization=_normalization(source, content.get("normalizer")),
        whole_piece_first=bool(model.get("ignore_merges")),
    )


def added_token(where: str, item: Any, token_id: int | None) -> AddedToken:
    """An entry of `added_tokens` or, with its id given, of `added_tokens_decoder`.

    Raises TokenizerError.
    """
    if not isinstance(item, dict):
        raise TokenizerError(f"{where}: expected an object, got {type(item).__name__}.")
    for name in ("lstrip", "rstrip", "single_word"):
        if item.get(name):
            raise TokenizerError(
                f"{where}: {name}: got {item[name]!r}; tokens that depend on the text around them "
                "are not supported."
            )
    return AddedToken(
        token_id=member(where, "", item, "id", int) if token_id is None else token_id,
        text=member(where, "", item, "content", str),
        special=bool(item.get("special")),
    )


def _normalization(source: str, normalizer: Any) -> Normalization:
    steps = _steps(normalizer, "normalizers")
    if steps is not None and all(step.get("type") == "NFC" for step in steps):
        return "segments" if steps else "none"
    raise TokenizerError(
        f"{source}: normalizer: got {str(normalizer)[:80]}; supported: none and NFC."
    )


def _pre_tokenizer(source: str, pre_tokenizer: Any) -> PreTokenizer:
    steps = _steps(pre_tokenizer, "pretokenizers")
    stages = [_stage(step) for step in steps or ()]
    found = _BY_STAGES.get(tuple(stage for stage in stages if stage is not None))
    last = steps[-1].get("type") if steps else None
    if found is None or "" in stages or last != "ByteLevel":
        raise TokenizerError(
            f"{source}: pre_tokenizer: got {str(pre_tokenizer)[:300]}; this way of splitting text "
            f"is not known. Known: those of {', '.join(PRE_TOKENIZERS)}."
        )
    return found


def _steps(node: Any, members: str) -> list[dict[str, Any]] | None:
    """The steps of a pipeline node, which is one step or a sequence; None if it is neither."""
    if node is None:
        return []
    if not isinstance(node, dict):
        return None
    if node.get("type") != "Sequence":
        return [node]
    steps = node.get(members)
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return None
    return steps


def _stage(step: Mapping[str, Any]) -> str | None:
    """The split pattern of one step; None if it splits nothing, "" if it is not understood."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return _BYTE_LEVEL if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return _DIGITS
    pattern = step.get("pattern")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        return expression if isinstance(expression, str) else ""
    return ""


def pre_tokenizer_json(pre_tokenizer: PreTokenizer) -> dict[str, Any] | None:
    """The `pre_tokenizer` node for a split pattern; None where the format cannot express it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    if pre_tokenizer.stages == (_BYTE_LEVEL,):
        return byte_level | {"use_regex": True}
    if pre_tokenizer.stages == (_DIGITS, _BYTE_LEVEL):
        steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    elif len(pre_tokenizer.stages) == 1:
        split = {
            "type": "Split",
            "pattern": {"Regex": pre_tokenizer.stages[0]},
            "behavior": "Isolated",
            "invert": False,
        }
        steps = [split, byte_level | {"use_regex": False}]
    else:
        return None
    return {"type": "Sequence", "pretokenizers": steps}
