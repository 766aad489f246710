"""Which licence a model folder says its weights have, as a short name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenkit.checkpoint.members import member, read_text

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_KNOWN = (  # in this order: the research licences' titles contain the plain ones' words
    (r"Tongyi Qianwen RESEARCH LICENSE", "tongyi-qianwen-research"),
    (r"Tongyi Qianwen LICENSE", "tongyi-qianwen"),
    (r"Qwen RESEARCH LICENSE", "qwen-research"),
    (r"Qwen LICENSE", "qwen"),
    (r"Apache License,?\s+Version 2\.0", "apache-2.0"),
    (r"MIT License", "mit"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"LLAMA 3\.(\d) COMMUNITY LICENSE", r"llama3.\1"),
    (r"LLAMA 3 COMMUNITY LICENSE", "llama3"),
)
_FIRST_CHARACTERS = 400  # a licence says its name at once; later it may quote others
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def read_licence(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The licence of the folder's LICENSE file when its title is well known, else what
    `config.json` or the head of README.md says; None when nothing does.
    """
    for name in _FILES:
        if file := member(folder, name):
            start = " ".join(read_text(file)[:_FIRST_CHARACTERS].split())
            for title, short in _KNOWN:
                if match := re.search(title, start, re.IGNORECASE):
                    return match.expand(short)
    stated = config.get("license")
    if isinstance(stated, str) and stated:
        return stated
    card = member(folder, "README.md")
    front = _FRONT_MATTER.match(read_text(card)) if card else None
    if front is None:
        return None
    head = front[1]
    return _front_value(head, "license_name") or _front_value(head, "license")


def _front_value(head: str, key: str) -> str | None:
    match = re.search(rf"^{key}:[ \t]*(\S.*?)[ \t]*$", head, re.MULTILINE)
    return match[1].strip("'\"") or None if match else None
