"""Checks of the files themselves: which are there, whole, and of one model."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwenkit.survey.doctor_facts import INDEXES, Facts, Finding, fault

_LFS_START = b"version https://git-lfs.github.com/spec/"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "qwen.tiktoken", "tokenizer.model")


def lfs_pointers(facts: Facts) -> Iterator[Finding]:
    folder = facts.folder or facts.path.parent
    for name, size in facts.files.items():
        if 0 < size < 1024:
            with (folder / name).open("rb") as file:
                is_pointer = file.read(200).startswith(_LFS_START)
            if is_pointer:
                yield fault(
                    "lfs-pointer",
                    name,
                    "is a git-LFS pointer, not the file. Run `git lfs pull` in the folder, or "
                    "download the model with `qwenkit pull`.",
                    "是 git-LFS 指针而不是文件本身。请在该目录运行 `git lfs pull`，"
                    "或用 `qwenkit pull` 下载模型。",
                )


def empty_files(facts: Facts) -> Iterator[Finding]:
    for name, size in facts.files.items():
        if size == 0 and name.endswith((*_WEIGHTS, ".json", ".tiktoken", "merges.txt", ".jinja")):
            yield fault("empty-file", name, "is empty; fetch it again.", "文件为空，请重新下载。")


def broken_links(facts: Facts) -> Iterator[Finding]:
    for name, size in facts.files.items():
        if size < 0:
            yield fault(
                "broken-link",
                name,
                "is a link that points nowhere; fetch the file again.",
                "是失效的链接，请重新下载该文件。",
            )


def unfinished_downloads(facts: Facts) -> Iterator[Finding]:
    for name in facts.files:
        if name.endswith(_UNFINISHED):
            yield fault(
                "unfinished-download",
                name,
                "is what an interrupted download left; run the download again.",
                "是中断的下载留下的文件，请重新下载。",
            )


def unreadable_json(facts: Facts) -> Iterator[Finding]:
    for name, reason in facts.unreadable.items():
        if "git-LFS" not in reason and facts.files.get(name):
            yield fault("broken-json", name, reason, f"不是有效的 JSON：{reason}")


def adapters(facts: Facts) -> Iterator[Finding]:
    if "adapter_config.json" in facts.files and "config.json" not in facts.files:
        yield fault(
            "adapter-only",
            "adapter_config.json",
            "this is an adapter (LoRA), not a model; open the model that it was trained on.",
            "这是适配器（LoRA）而不是模型，请打开它所基于的模型。",
        )


def missing_config(facts: Facts) -> Iterator[Finding]:
    if facts.folder is None or "config.json" in facts.files or _only_gguf(facts):
        return
    if "adapter_config.json" in facts.files:
        return
    below = sorted(p.parent.name for p in facts.folder.glob("*/config.json"))
    if below:
        yield fault(
            "nested-folder",
            below[0],
            f"the model lies one folder deeper; open {below[0]!r} in it.",
            f"模型在下一级目录中，请打开 {below[0]!r}。",
        )
    else:
        yield fault(
            "no-config",
            "config.json",
            "is missing; without it the weights cannot be understood.",
            "缺失；没有它无法理解权重。",
        )


def missing_weights(facts: Facts) -> Iterator[Finding]:
    names = [n for n in facts.files if n.endswith(_WEIGHTS) and not n.startswith("adapter_")]
    names += [n for n in facts.files if n in INDEXES]
    if facts.folder and not names and "config.json" in facts.files:
        yield fault(
            "no-weights",
            "model.safetensors",
            "there are no weights in the folder; download the model again.",
            "目录中没有权重文件，请重新下载模型。",
        )


def shards(facts: Facts) -> Iterator[Finding]:
    weight_map = facts.index.get("weight_map")
    wanted = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    for name in sorted(n for n in wanted if isinstance(n, str) and n not in facts.files):
        yield fault(
            "missing-shard",
            name,
            "is named in the index but missing; fetch it.",
            "索引中有该分片，但文件缺失，请下载。",
        )
    parts = {n: m for n in facts.files if (m := _PART.search(n))}
    if parts and not any(n in facts.files for n in INDEXES):
        yield fault(
            "no-index",
            "model.safetensors.index.json",
            f"is missing, though {len(parts)} parts of the weights are here; fetch it.",
            f"缺失，但目录中有 {len(parts)} 个权重分片，请下载索引文件。",
        )
    for name in sorted(set(parts) - wanted) if wanted else []:
        yield fault(
            "stray-shard",
            name,
            "belongs to no part of the index: left from another version. Delete it.",
            "不在索引中，可能是其他版本留下的分片，请删除。",
        )


def damaged_weights(facts: Facts) -> Iterator[Finding]:
    error = facts.opening_error
    if error is None or not error.file.endswith(_WEIGHTS) or "git-LFS" in str(error):
        return
    if any(name in str(error) for name in INDEXES):
        yield fault(
            "index-disagrees",
            error.file.rpartition("/")[2],
            f"index and weights are not of one model: {error.field} "
            f"{str(error).partition(f'{error.field}: ')[2]} Fetch both again.",
            f"索引与权重文件不一致（{error.field}），可能来自不同版本，请重新下载两者。",
        )
        return
    if facts.files.get(error.file.rpartition("/")[2]):  # empty and dead ones are found elsewhere
        yield fault(
            "damaged-weights",
            error.file.rpartition("/")[2],
            f"cannot be read, fetch it again: {error}",
            f"无法读取，请重新下载：{error}",
        )


def missing_tokenizer(facts: Facts) -> Iterator[Finding]:
    if facts.folder is None or "config.json" not in facts.files:
        return
    there = [n for n in _TOKENIZERS if n in facts.files]
    if not there:
        yield fault(
            "no-tokenizer",
            "tokenizer.json",
            "there is no tokenizer: no tokenizer.json, vocab.json with merges.txt or "
            "qwen.tiktoken. Fetch it from the model's repository.",
            "没有分词器文件（tokenizer.json、vocab.json 加 merges.txt 或 qwen.tiktoken），"
            "请从模型仓库下载。",
        )
    elif there == ["vocab.json"] and "merges.txt" not in facts.files:
        yield fault(
            "no-merges",
            "merges.txt",
            "is missing, and vocab.json is no tokenizer without it; fetch it.",
            "缺失；只有 vocab.json 不能构成分词器，请下载。",
        )


def two_kinds_of_weights(facts: Facts) -> Iterator[Finding]:
    kinds = [
        kind
        for kind, names in {
            "safetensors": ("model.safetensors", INDEXES[0]),
            "bin": ("pytorch_model.bin", INDEXES[1]),
        }.items()
        if any(name in facts.files for name in names)
    ]
    if len(kinds) == 2:
        yield fault(
            "two-weights",
            "pytorch_model.bin",
            "the weights are here twice; safetensors is read. Delete the .bin files, which may be "
            "of another version.",
            "存在两份权重，程序读取 safetensors。请删除可能属于其他版本的 .bin 文件。",
        )


def _only_gguf(facts: Facts) -> bool:
    return any(name.endswith(".gguf") for name in facts.files)


CHECKS = (
    lfs_pointers,
    empty_files,
    broken_links,
    unfinished_downloads,
    unreadable_json,
    adapters,
    missing_config,
    missing_weights,
    shards,
    damaged_weights,
    missing_tokenizer,
    two_kinds_of_weights,
)
