"""Reading tokenizer files: bytes, JSON objects and lists of merges, or an error that names the
file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenkit.errors import TokenizerError

_LARGEST_FILE_BYTES = 1 << 28


def read_bytes(path: Path) -> bytes:
    """The content of a vocabulary file. Raises TokenizerError."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE_BYTES:
            raise TokenizerError(
                f"{path}: {size} bytes; no tokenizer file is above {_LARGEST_FILE_BYTES}."
            )
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            f"{path}: this is a git-LFS pointer of {len(data)} bytes, not the file itself. Fetch "
            "the content with 'git lfs pull', or download the model with 'qwenkit pull'."
        )
    return data


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises TokenizerError."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8: {error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a key given twice is an error. Raises TokenizerError."""
    try:
        value = json.loads(read_text(path), object_pairs_hook=_unique)
    except TokenizerError as error:
        raise TokenizerError(
            str(error) if str(path) in str(error) else f"{path}: {error}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        names = [name for name, _ in items]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise TokenizerError(f"the key {twice!r} is given twice.")
    return found


def member(source: str, field: str, holder: Mapping[str, Any], key: str, kind: type) -> Any:
    """`holder[key]`, which must be of `kind`. Raises TokenizerError naming source and field."""
    value = holder.get(key)
    if type(value) is not kind:
        raise TokenizerError(
            f"{source}: {field}{key}: expected {kind.__name__}, got "
            f"{'nothing' if key not in holder else repr(value)[:60]}."
        )
    return value


def merge_lines(where: str, merges: Sequence[Any]) -> Sequence[str]:
    """Merges as lines "left right"; some files have [left, right]. Raises TokenizerError."""
    if set(map(type, merges)) <= {str}:
        return merges
    lines = []
    for index, merge in enumerate(merges):
        if isinstance(merge, list) and len(merge) == 2 and set(map(type, merge)) == {str}:
            merge = " ".join(merge)
        if not isinstance(merge, str):
            raise TokenizerError(f"{where}[{index}]: expected two tokens, got {str(merge)[:80]}.")
        lines.append(merge)
    return lines
