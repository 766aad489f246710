"""Vocabulary files that are damaged, or not what they say: refused by file and field."""

from __future__ import annotations

import base64
import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import from_folder, from_gguf, from_tiktoken
from tokenizer_toys import gguf, tokenizer_json, write

Change = Callable[[dict[str, Any]], object]


def _set(*path: Any) -> Change:
    """A change that sets the value (last of `path`) at the place (all before it)."""

    def change(content: Any) -> None:
        *above, key, value = path
        for step in above:
            content = content[step]
        content[key] = value

    return change


def _drop(*path: Any) -> Change:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("model"), "model: expected dict, got nothing"),
        (_set("model", []), "model: expected dict"),
        (_set("model", "type", "Unigram"), r"model\.type: got 'Unigram'"),
        (_set("model", "byte_fallback", True), r"model\.byte_fallback"),
        (_set("model", "unk_token", "<unk>"), r"model\.unk_token"),
        (_drop("model", "vocab"), r"model\.vocab: expected dict, got nothing"),
        (_set("model", "vocab", {}), "vocabulary is empty"),
        (_set("model", "vocab", "a", 98), "id 98, which another token has too"),
        (_set("model", "vocab", "a", "7"), "token id '7' is not a whole number"),
        (_set("model", "vocab", "a", -1), "token id -1 is not a whole number"),
        (_set("model", "vocab", "a", True), "token id True is not a whole number"),
        (_set("model", "vocab", "a", 10**12), "token id 1000000000000 is not"),
        (_set("model", "vocab", "", 300), "token 300 is empty"),
        (_set("model", "vocab", "▁a", 300), "not written in the byte-level alphabet"),
        (_set("model", "merges", None), r"model\.merges: expected list, got None"),
        (_set("model", "merges", 1, "a  b"), r"merges\[1\]: 'a  b' needs the token ' b'"),
        (_set("model", "merges", 1, "ab"), r"merges\[1\]: 'ab' needs the token ''"),
        (_set("model", "merges", 1, ["a", 5]), r"merges\[1\]: expected two tokens, got \['a', 5\]"),
        (_set("model", "merges", 2, "a c"), r"merges\[2\]: 'a c' needs the token 'ac'"),
        (_set("model", "merges", 2, "a b"), r"merges\[2\]: 'a b' is listed twice"),
        (_set("normalizer", {"type": "Lowercase"}), "normalizer: got"),
        (_set("pre_tokenizer", None), "pre_tokenizer: got None"),
        (_set("pre_tokenizer", {"type": "Metaspace"}), "pre_tokenizer: got"),
        (_set("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"), "pre_tokenizer: got"),
        (_set("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "(a+)+b"}), "not known"),
        (_set("pre_tokenizer", "pretokenizers", 0, "pattern", {"String": " "}), "not known"),
        (_set("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "not known"),
        (_set("decoder", {"type": "Metaspace"}), "decoder: got"),
        (_set("added_tokens", 5), "added_tokens: expected list"),
        (_set("added_tokens", 0, 5), r"added_tokens\[0\]: expected an object"),
        (_set("added_tokens", 0, "id", "259"), r"added_tokens\[0\]: id: expected int"),
        (_set("added_tokens", 0, "content", ""), "control token 259 has no text"),
        (_set("added_tokens", 0, "content", None), r"added_tokens\[0\]: content: expected str"),
        (_set("added_tokens", 0, "lstrip", True), "lstrip: got True"),
        (_set("added_tokens", 0, "id", 260), "id 260, but '<.im_start.>' has that id too"),
        (_set("added_tokens", 0, "id", 3), "token 'ĥ' has id 3, which another token has too|id 3"),
        (_set("added_tokens", 0, "content", "abc"), "'abc' has id 259, but id 258 has that text"),
        (_set("added_tokens", 0, {"id": 258, "content": "abc", "special": True}), "forge it"),
        (_set("added_tokens", 0, {"id": 97, "content": "a", "special": True}), "forge it"),
        (_set("added_tokens", 0, "content", "\ud800"), "not valid Unicode"),
    ],
)
def test_unusable_tokenizer_json(tmp_path: Path, change: Change, message: str) -> None:
    content = tokenizer_json()
    change(content)
    with pytest.raises(TokenizerError, match=message) as raised:
        from_folder(write(tmp_path, content))
    assert str(tmp_path / "tokenizer.json") in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model": {"vocab": {"a": 1, "a": 2}}}', "the key 'a' is given twice"),
        ('{"model": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_unusable_json(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as raised:
        from_folder(write(tmp_path, text))
    assert str(tmp_path / "tokenizer.json") in str(raised.value)


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(TokenizerError, match="not UTF-8"):
        from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [[], {"x": {}}, {"-1": {}}, {"1" * 40: {}}])
def test_unusable_added_tokens_decoder(tmp_path: Path, decoder: Any) -> None:
    write(tmp_path, tokenizer_json())
    write(tmp_path, {"added_tokens_decoder": decoder or [1]}, "tokenizer_config.json")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("tokenizer.ggml.model"), "model: got None"),
        (_set("tokenizer.ggml.model", "llama"), r"tokenizer\.ggml\.model: got 'llama'"),
        (_drop("tokenizer.ggml.pre"), r"tokenizer\.ggml\.pre: got None"),
        (_set("tokenizer.ggml.pre", "qwen3"), "Did you mean 'qwen2'"),
        (_set("tokenizer.ggml.pre", ["qwen2"]), r"tokenizer\.ggml\.pre: got"),
        (_set("tokenizer.ggml.add_space_prefix", True), "add_space_prefix"),
        (_drop("tokenizer.ggml.tokens"), r"tokenizer\.ggml\.tokens: expected a list"),
        (_set("tokenizer.ggml.tokens", "abc"), r"tokenizer\.ggml\.tokens: expected a list"),
        (_set("tokenizer.ggml.tokens", 5, 7), r"tokenizer\.ggml\.tokens\[5\]: expected str"),
        (_set("tokenizer.ggml.tokens", 5, "a"), "'a' is listed twice, as 5 and 97"),
        (_set("tokenizer.ggml.tokens", []), "262 types for 0 tokens"),
        (_drop("tokenizer.ggml.token_type"), "token_type: expected a list"),
        (_set("tokenizer.ggml.token_type", 5, 6), r"token_type\[5\]: got 6"),
        (_set("tokenizer.ggml.token_type", 5, 1.5), r"token_type\[5\]: expected int"),
        (_set("tokenizer.ggml.token_type", 97, 3), "forge it"),
        (_set("tokenizer.ggml.token_type", 258, 3), "forge it"),
        (_drop("tokenizer.ggml.merges"), r"tokenizer\.ggml\.merges: expected a list"),
        (_set("tokenizer.ggml.merges", 0, "a x"), r"merges\[0\]: 'a x' needs the token 'ax'"),
        (_set("tokenizer.ggml.merges", 0, None), r"merges\[0\]: expected str"),
    ],
)
def test_unusable_gguf_metadata(change: Change, message: str) -> None:
    metadata = gguf()
    change(metadata)
    with pytest.raises(TokenizerError, match=message) as raised:
        from_gguf(metadata)
    assert "GGUF metadata" in str(raised.value)


def _ranked(*tokens: bytes) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 tokens"),
        ([*_ranked(b"a"), b"!!! 1"], "line 2: expected a base64 token and its rank 1"),
        ([*_ranked(b"a"), b"Yg=="], "line 2"),
        ([*_ranked(b"a"), b"Yg== 7"], "line 2"),
        ([*_ranked(b"a"), b"Yg== one"], "line 2"),
        ([*_ranked(b"a"), b" 1"], "line 2"),
        (_ranked(b"a", b"b", b"a"), "3 tokens, 2 different ones"),
    ],
)
def test_unusable_tiktoken_file(tmp_path: Path, lines: list[bytes], message: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(TokenizerError, match=message) as raised:
        from_tiktoken(path)
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"qwen\.tiktoken: cannot be read: No such file"):
        from_tiktoken(tmp_path / "qwen.tiktoken")
    (tmp_path / "vocab.tiktoken").mkdir()
    with pytest.raises(TokenizerError, match=r"vocab\.tiktoken: cannot be read"):
        from_tiktoken(tmp_path / "vocab.tiktoken")


JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**63,
    1.5,
    "",
    "a",
    "Ġ",
    "\ud800",
    [],
    ["a"],
    {},
    {"a": 1},
)


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ()
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found.append((node, key))
        found += _places(node[key])
    return found


def _mutate(content: Any, rng: random.Random) -> None:
    holder, key = rng.choice(_places(content))
    if rng.random() < 0.3:
        del holder[key]
    elif rng.random() < 0.3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[key] = rng.choice(JUNK)


def _small(content: dict[str, Any]) -> dict[str, Any]:
    """The same with few tokens, so that random changes hit every kind of place often."""
    keep = {"a", "b", "c", "Ġ", "ab", "Ġab", "abc", "<|im_start|>", "<think>"}
    if "model" in content:
        model = content["model"]
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t in keep}
        return content
    kept = [i for i, t in enumerate(content["tokenizer.ggml.tokens"]) if t in keep]
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        content[name] = [content[name][i] for i in kept]
    return content


@pytest.mark.parametrize("kind", ["tokenizer.json", "gguf"])
def test_random_changes_are_refused_or_loaded(tmp_path: Path, kind: str) -> None:
    refused = 0
    for seed in range(700):
        rng = random.Random(seed)
        content = _small(gguf() if kind == "gguf" else tokenizer_json())
        for _ in range(rng.randrange(1, 4)):
            _mutate(content, rng)
        try:
            folder = tmp_path if kind == "gguf" else write(tmp_path, content)
            tokenizer = from_gguf(content) if kind == "gguf" else from_folder(folder)
        except TokenizerError:
            refused += 1
        else:
            text = "abc ab<think> \u00e9\x00"
            for allowed in ("all", ()):
                ids = tokenizer.encode(text, allowed_special=allowed)
                assert len(tokenizer.decode(ids)) <= len(text)
    assert 150 < refused < 700
