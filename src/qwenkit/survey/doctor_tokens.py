"""Checks of the tokenizer and the special tokens, against each other and the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenkit.survey.doctor_facts import Facts, Finding, fault, note

_GENERATION = "generation_config.json"
_SETTINGS = "tokenizer_config.json"
_MOST_PADDING = 1024  # rows; of the published models 418 at most, in Qwen2-72B
_SPECIAL_KEYS = ("eos_token_id", "pad_token_id", "bos_token_id")
_CHAT_NAME = re.compile(r"(?:^|[-_.])(?:chat|instruct)(?:[-_.]|$)", re.IGNORECASE)


def broken_tokenizer(facts: Facts) -> Iterator[Finding]:
    error = facts.tokenizer_error
    known = ("no tokenizer found", "git-LFS", "is empty")  # found as files
    if error and not any(k in str(error) for k in known) and not _not_json(facts):
        yield fault("broken-tokenizer", "tokenizer", str(error), f"分词器无法使用：{error}")


def _not_json(facts: Facts) -> bool:
    return bool({_SETTINGS, "tokenizer.json"} & set(facts.unreadable))


def two_vocabularies(facts: Facts) -> Iterator[Finding]:
    if facts.folder is None or not {"tokenizer.json", "vocab.json"} <= set(facts.files):
        return
    fast, slow = _vocabulary(facts.folder / "tokenizer.json"), _json(facts.folder / "vocab.json")
    if fast and slow and fast != slow:
        yield fault(
            "two-vocabularies",
            "vocab.json",
            f"has {len(slow)} tokens, tokenizer.json {len(fast)}, and they are not the same: "
            "files of two models. Take both from one repository.",
            f"有 {len(slow)} 个词元，tokenizer.json 有 {len(fast)} 个，二者不一致，"
            "请从同一仓库下载。",
        )


def _vocabulary(file: Path) -> Any:
    model = _json(file).get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # what is wrong with it, another check says
    return value if isinstance(value, dict) else {}


def vocabulary_and_rows(facts: Facts) -> Iterator[Finding]:
    if facts.tokenizer is None or facts.model_config is None:
        return
    ids, rows = facts.tokenizer.vocab_size, facts.model_config.vocab_size
    if ids > rows:
        yield fault(
            "vocabulary-too-large",
            "config.json",
            f"the tokenizer has {ids} ids, the embedding only {rows} rows (vocab_size): tokens "
            "were added without resizing the model, or the files are of two models.",
            f"分词器有 {ids} 个 id，而词嵌入只有 {rows} 行（vocab_size）："
            "增加词元后没有扩展模型，或文件不属于同一模型。",
        )
    elif rows - ids > _MOST_PADDING:
        yield fault(
            "vocabulary-too-small",
            "tokenizer",
            f"has {ids} ids for the {rows} rows of the embedding (vocab_size), which no padding "
            "explains: the tokenizer is another model's. Take it from the model's own repository.",
            f"分词器只有 {ids} 个 id，而词嵌入有 {rows} 行（vocab_size），不可能是填充："
            "分词器属于其他模型，请从该模型自己的仓库下载。",
        )
    elif ids < rows:
        yield note(
            "padded-vocabulary",
            "config.json",
            f"{rows - ids} of {rows} rows of the embedding stand for no token; that is padding, "
            "and they are never sampled.",
            f"词嵌入 {rows} 行中有 {rows - ids} 行没有对应词元，是填充行，不会被采样。",
        )


def ends_of_text(facts: Facts) -> Iterator[Finding]:
    """Every source that names the end must agree, or replies go on for ever."""
    stops = _ids(facts, "eos_token_id")
    named = facts.tokenizer_config.get("eos_token")
    named_id = facts.control_id(named)
    text = named.get("content") if isinstance(named, dict) else named
    if stops and named_id is not None and named_id not in stops:
        yield fault(
            "eos-mismatch",
            _SETTINGS,
            f"eos_token is {text!r} ({named_id}), but config.json and {_GENERATION} end at "
            f"{sorted(stops)}. Other programs may not stop: add {named_id} to eos_token_id.",
            f"eos_token 为 {text!r}（{named_id}），而 config.json 与 {_GENERATION} 为 "
            f"{sorted(stops)}，可能无法停止生成，请将 {named_id} 加入 eos_token_id。",
        )
    turn = facts.control_id("<|im_end|>")
    is_chat = _CHAT_NAME.search(facts.path.name) is not None and facts.model_type != "qwen"
    if is_chat and turn is not None and stops and turn not in stops and named_id != turn:
        yield fault(
            "eos-misses-turn",
            _GENERATION,
            f"eos_token_id {sorted(stops)} lacks the end of a turn, <|im_end|> ({turn}): other "
            "programs will not stop after a reply. Add it.",
            f"eos_token_id {sorted(stops)} 不含轮次结束符 <|im_end|>（{turn}），"
            "其他程序不会在回复后停止，请加入。",
        )


def two_ends(facts: Facts) -> Iterator[Finding]:
    """Programs read the one file or the other; published ones share an id."""
    ours, theirs = (_in_file(file, "eos_token_id") for file in (facts.config, facts.generation))
    if facts.folder is not None and ours and theirs and not ours & theirs:
        yield fault(
            "two-ends",
            _GENERATION,
            f"eos_token_id is {sorted(theirs)}, in config.json {sorted(ours)}: which of them stops "
            "depends on the program. Take both files from one repository.",
            f"eos_token_id 为 {sorted(theirs)}，而 config.json 中为 {sorted(ours)}，"
            "不同程序停止的位置不同，请从同一仓库下载这两个文件。",
        )


def written_ids(facts: Facts) -> Iterator[Finding]:
    for file, key, value in _given_ids(facts):
        wrong = [i for i in _listed(value) if i is not None and type(i) is not int]
        if wrong:
            yield fault(
                "special-id-kind",
                file,
                f"{key} is {value!r}; expected the number of a token, or a list of such.",
                f"{key} 为 {value!r}，应为词元的 id（整数）或其列表。",
            )


def special_ids(facts: Facts) -> Iterator[Finding]:
    """Ids that are no token: outside the embedding, or of a row that is padding."""
    if facts.model_config is None:
        return
    rows = facts.model_config.vocab_size
    tokens = rows if facts.tokenizer is None else min(rows, facts.tokenizer.vocab_size)
    for file, key, value in _given_ids(facts):
        least = 0 if key == "eos_token_id" else -1  # -1: "none" in some older files
        for token_id in sorted({i for i in _listed(value) if type(i) is int}):
            if not least <= token_id < rows:
                yield fault(
                    "special-id-range",
                    file,
                    f"{key} {token_id} is no row of the embedding, which has {rows}.",
                    f"{key} {token_id} 超出词嵌入的 {rows} 行。",
                )
            elif token_id >= tokens:
                yield fault(
                    "special-id-range",
                    file,
                    f"{key} {token_id} is no token: the tokenizer has {tokens}, the rows above "
                    "are padding.",
                    f"{key} {token_id} 不是词元：分词器只有 {tokens} 个，其后的行是填充。",
                )


def ordinary_ends(facts: Facts) -> Iterator[Finding]:
    """Ends that are ordinary text: the first word that contains them would end a reply."""
    if facts.tokenizer is None or not facts.tokenizer.control_tokens:
        return
    plain = range(facts.tokenizer.vocab_size)
    control = set(facts.tokenizer.control_tokens.values())
    for file, key, value in _given_ids(facts):
        ends = {i for i in _listed(value) if type(i) is int and i in plain} - control
        for token_id in sorted(ends) if key == "eos_token_id" else []:
            text = facts.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
            yield fault(
                "ordinary-end",
                file,
                f"{key} {token_id} is {text!r}, a token of ordinary text: replies break off where "
                "it is written. Name the token that ends a text.",
                f"{key} {token_id} 为 {text!r}，是普通文本词元，回复会在该处中断，请改为结束词元。",
            )


def special_names(facts: Facts) -> Iterator[Finding]:
    for key in ("eos_token", "pad_token", "bos_token"):
        value = facts.tokenizer_config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if facts.tokenizer and isinstance(text, str) and text and facts.control_id(text) is None:
            yield fault(
                "unknown-special-token",
                _SETTINGS,
                f"{key} is {text!r}, which the tokenizer does not have.",
                f"{key} 为 {text!r}，分词器中没有该词元。",
            )


def beginning_of_text(facts: Facts) -> Iterator[Finding]:
    if facts.tokenizer_config.get("add_bos_token") is True and facts.model_type.startswith("qwen"):
        yield fault(
            "added-bos",
            _SETTINGS,
            "add_bos_token is true, but Qwen models were trained without a token before the text. "
            "Set it to false.",
            "add_bos_token 为 true，但 Qwen 模型训练时文本前没有起始词元，请改为 false。",
        )


def _given_ids(facts: Facts) -> Iterator[tuple[str, str, Any]]:
    """(file, key, what it says) of each key for special tokens."""
    for file, values in (("config.json", facts.config), (_GENERATION, facts.generation)):
        for key in _SPECIAL_KEYS:
            yield file, key, values.get(key)


def _ids(facts: Facts, key: str) -> set[int]:
    """The ids that generation config and config give for `key`."""
    return _in_file(facts.generation, key) | _in_file(facts.config, key)


def _in_file(values: Mapping[str, Any], key: str) -> set[int]:
    return {i for i in _listed(values.get(key)) if type(i) is int}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


CHECKS = (
    broken_tokenizer,
    two_vocabularies,
    vocabulary_and_rows,
    ends_of_text,
    two_ends,
    written_ids,
    special_ids,
    ordinary_ends,
    special_names,
    beginning_of_text,
)
