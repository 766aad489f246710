"""Readers: every published format, and every way in which a file can be unusable."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import BytePairTokenizer, from_folder, from_gguf, from_tiktoken
from qwenkit.tokenizer.bpe import BYTE_ALPHABET
from qwenkit.tokenizer.ranks import write_ranks

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENS = [*BYTE_ALPHABET, "ab", "Ġab", "abc"]
MERGES = ["a b", "Ġ ab", "ab c"]


def _vocab() -> dict[str, int]:
    return {token: i for i, token in enumerate(TOKENS)}


def _tokenizer_json() -> dict[str, Any]:
    return {
        "added_tokens": [
            {"id": 259, "content": "<|im_start|>", "special": True},
            {"id": 260, "content": "<think>", "special": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "unk_token": None, "vocab": _vocab(), "merges": list(MERGES)},
    }


def _gguf() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*TOKENS, "<|im_start|>", "<think>", "[PAD261]"],
        "tokenizer.ggml.token_type": [1] * 259 + [3, 4, 5],
        "tokenizer.ggml.merges": list(MERGES),
    }


def _write(folder: Path, content: object, name: str = "tokenizer.json") -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def _split_files(folder: Path, **config: Any) -> Path:
    _write(folder, _vocab(), "vocab.json")
    _write(folder, "#version: 0.2\n" + "\n".join(MERGES) + "\n", "merges.txt")
    decoder = {
        "259": {"content": "<|im_start|>", "special": True},
        "260": {"content": "<think>", "special": False},
    }
    return _write(folder, {"added_tokens_decoder": decoder} | config, "tokenizer_config.json")


def _check_toy(tokenizer: BytePairTokenizer) -> None:
    assert tokenizer.vocab_size == 261
    assert tokenizer.control_tokens == {"<|im_start|>": 259, "<think>": 260}
    assert tokenizer.special_ids == {259}
    assert tokenizer.encode("abc ab") == [258, 257]
    text = "abc<|im_start|>1<think>"
    assert tokenizer.encode(text, allowed_special="all") == [258, 259, ord("1"), 260]
    assert tokenizer.encode(text, allowed_special={"<think>"})[-2:] == [ord("1"), 260]
    assert not {259, 260} & set(tokenizer.encode(text))
    assert tokenizer.encode("A\u030a") == tokenizer.encode("Å")


def test_tokenizer_json(tmp_path: Path) -> None:
    _check_toy(from_folder(_write(tmp_path, _tokenizer_json())))


def test_tokenizer_json_with_merges_as_pairs(tmp_path: Path) -> None:
    content = _tokenizer_json()
    content["model"]["merges"] = [merge.split() for merge in MERGES]
    _check_toy(from_folder(_write(tmp_path, content)))


def test_tokenizer_json_that_lists_control_tokens_in_its_vocabulary(tmp_path: Path) -> None:
    content = _tokenizer_json()
    content["model"]["vocab"] |= {"<|im_start|>": 259, "<think>": 260}
    _check_toy(from_folder(_write(tmp_path, content)))


def test_tokenizer_config_completes_tokenizer_json(tmp_path: Path) -> None:
    content = _tokenizer_json()
    added = content["added_tokens"].pop()
    decoder = {"260": {"content": added["content"], "special": False}}
    _write(tmp_path, {"added_tokens_decoder": decoder}, "tokenizer_config.json")
    _check_toy(from_folder(_write(tmp_path, content)))


@pytest.mark.parametrize(
    "node",
    [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
        },
    ],
)
def test_gpt2_pipeline(tmp_path: Path, node: dict[str, Any]) -> None:
    content = _tokenizer_json() | {"normalizer": None, "pre_tokenizer": node}
    tokenizer = from_folder(_write(tmp_path, content))
    assert tokenizer.vocabulary.pre_tokenizer.name == "gpt-2"
    assert tokenizer.encode("A\u030a") == [ord("A"), 0xCC, 0x8A]


def test_smollm_pipeline(tmp_path: Path) -> None:
    node = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
    }
    content = _tokenizer_json() | {"normalizer": None, "pre_tokenizer": node}
    content["model"]["merges"] = ["1 2", "Ġ 1", "Ġ Ġ"]
    content["model"]["vocab"] |= {"12": 261, "Ġ1": 262, "ĠĠ": 263}
    tokenizer = from_folder(_write(tmp_path, content))
    assert tokenizer.vocabulary.pre_tokenizer.name == "smollm"
    assert tokenizer.encode("  12") == [263, ord("1"), ord("2")]


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_vocab_and_merges(tmp_path: Path, kind: str) -> None:
    _check_toy(from_folder(_split_files(tmp_path, tokenizer_class=kind)))


def test_vocab_and_merges_of_a_model_folder(tmp_path: Path) -> None:
    _split_files(tmp_path)
    _write(tmp_path, {"model_type": "qwen2"}, "config.json")
    _check_toy(from_folder(tmp_path))


def test_vocab_and_merges_with_windows_line_ends(tmp_path: Path) -> None:
    _split_files(tmp_path, tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\r\na b\r\n\xc4\xa0 ab\r\nab c\r\n")
    _check_toy(from_folder(tmp_path))


def test_added_tokens_json_with_roles(tmp_path: Path) -> None:
    _split_files(tmp_path)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_start|>"}
    _write(tmp_path, config, "tokenizer_config.json")
    _write(tmp_path, {"<|im_start|>": 259, "<think>": 260}, "added_tokens.json")
    _check_toy(from_folder(tmp_path))
    config.pop("eos_token")
    _write(tmp_path, config, "tokenizer_config.json")
    roles = {"additional_special_tokens": [{"content": "<|im_start|>"}]}
    _write(tmp_path, roles, "special_tokens_map.json")
    _check_toy(from_folder(tmp_path))


def test_vocab_alone_does_not_say_how_text_is_split(tmp_path: Path) -> None:
    _split_files(tmp_path, tokenizer_class="LlamaTokenizer")
    with pytest.raises(TokenizerError, match="tokenizer_class 'LlamaTokenizer'"):
        from_folder(tmp_path)
    _check_toy(from_folder(tmp_path, pre_tokenizer="qwen2"))
    with pytest.raises(TokenizerError, match="Did you mean 'qwen2'"):
        from_folder(tmp_path, pre_tokenizer="qwen")


def test_gguf() -> None:
    _check_toy(from_gguf(_gguf()))


def test_gguf_with_unused_tokens_between(tmp_path: Path) -> None:
    metadata = _gguf()
    metadata["tokenizer.ggml.tokens"][258:258] = ["[PAD258]"]
    metadata["tokenizer.ggml.token_type"][258:258] = [5]
    tokenizer = from_gguf(metadata)
    assert tokenizer.vocabulary.unused_ids == {258}
    assert tokenizer.encode("abc") == [259]
    assert tokenizer.decode([258, 259]) == "abc"


def test_an_ordinary_token_listed_as_added_stays_ordinary() -> None:
    metadata = _gguf()
    metadata["tokenizer.ggml.token_type"][258] = 4
    tokenizer = from_gguf(metadata)
    assert tokenizer.encode("abc") == [258]
    assert "abc" not in tokenizer.control_tokens


def test_first_release_names(qwen_tiktoken_path: Path) -> None:
    tokenizer = from_tiktoken(qwen_tiktoken_path, release="first")
    assert tokenizer.vocab_size == 151851
    names = ("<|im_end|>", "<R>", "<S>", "<X>", "<mask>", "<sep>", "<extra_0>", "<extra_199>")
    ids = [tokenizer.control_tokens[name] for name in names]
    assert ids == [151645, 151646, 151647, 151648, 151649, 151650, 151651, 151850]
    with pytest.raises(TokenizerError, match="Did you mean 'first'"):
        from_tiktoken(qwen_tiktoken_path, release="frist")  # type: ignore[arg-type]


@pytest.mark.parametrize("lacking", [{0}, {0x41, 0xFF}])
def test_a_first_generation_without_all_bytes_is_refused(tmp_path: Path, lacking: set[int]) -> None:
    path = tmp_path / "qwen.tiktoken"
    kept = [bytes([value]) for value in range(256) if value not in lacking]
    write_ranks(path, {token: rank for rank, token in enumerate([*kept, b"ab"])})
    message = rf"{len(lacking)} of the 256 tokens of one byte are missing.* 0x{min(lacking):02x};"
    with pytest.raises(TokenizerError, match=message):
        from_tiktoken(path)


def test_folder_of_the_first_generation(qwen_tiktoken_path: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken_path)
    assert from_folder(tmp_path).control_tokens["<|extra_0|>"] == 151646
    decoder = {"151646": {"content": "<|object_ref_start|>", "special": True}}
    _write(tmp_path, {"added_tokens_decoder": decoder}, "tokenizer_config.json")
    with pytest.raises(TokenizerError, match="different generations"):
        from_folder(tmp_path)


def test_an_empty_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json, vocab\.json with merges\.txt, qwen"
    ):
        from_folder(tmp_path)
    _write(tmp_path, _vocab(), "vocab.json")
    _write(tmp_path, "", "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"no tokenizer found.* SentencePiece"):
        from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "qwen.tiktoken", "tokenizer_config.json"])
def test_git_lfs_pointers_are_named(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031645\n"
    with pytest.raises(TokenizerError, match=f"{name}: this is a git-LFS pointer"):
        from_folder(_write(tmp_path, pointer, name))


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
    content = _tokenizer_json()
    change(content)
    with pytest.raises(TokenizerError, match=message) as raised:
        from_folder(_write(tmp_path, content))
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
        from_folder(_write(tmp_path, text))
    assert str(tmp_path / "tokenizer.json") in str(raised.value)


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(TokenizerError, match="not UTF-8"):
        from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [[], {"x": {}}, {"-1": {}}, {"1" * 40: {}}])
def test_unusable_added_tokens_decoder(tmp_path: Path, decoder: Any) -> None:
    _write(tmp_path, _tokenizer_json())
    _write(tmp_path, {"added_tokens_decoder": decoder or [1]}, "tokenizer_config.json")
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
    metadata = _gguf()
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
        content = _small(_gguf() if kind == "gguf" else _tokenizer_json())
        for _ in range(rng.randrange(1, 4)):
            _mutate(content, rng)
        try:
            folder = tmp_path if kind == "gguf" else _write(tmp_path, content)
            tokenizer = from_gguf(content) if kind == "gguf" else from_folder(folder)
        except TokenizerError:
            refused += 1
        else:
            text = "abc ab<think> \u00e9\x00"
            for allowed in ("all", ()):
                ids = tokenizer.encode(text, allowed_special=allowed)
                assert len(tokenizer.decode(ids)) <= len(text)
    assert 150 < refused < 700
