"""Every exception a qwenkit user can meet, as one tree.

Each message names what was given, what is allowed and what to do. Nothing here imports anything
else of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QwenkitError(Exception):
    """Base class of every error that qwenkit raises on purpose."""


class UsageError(QwenkitError, ValueError):
    """An argument, option or setting cannot be used as given."""


class RequestError(UsageError):
    """A generation request was refused before it reached the engine; `field` names the offending
    field.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelNotFoundError(QwenkitError):
    """A model name or path leads to nothing that can be loaded."""


class NetworkError(QwenkitError):
    """A hub could not be reached or answered wrongly."""


class CheckpointError(QwenkitError):
    """A model file is malformed, incomplete or not what its header says.

    `file` is the file as the user knows it, `field` the header field, tensor or key at fault.
    """

    def __init__(self, file: object, field: str, message: str) -> None:
        super().__init__(f"{file}: {field}: {message}")
        self.file = str(file)
        self.field = field


class ConfigError(QwenkitError, ValueError):
    """A model configuration is missing a key, or holds a value that no known architecture has."""


class TokenizerError(QwenkitError, ValueError):
    """A vocabulary file is unusable, or text or ids cannot be converted as asked."""


class TemplateError(QwenkitError, ValueError):
    """A chat template is malformed, did something forbidden, or refused the messages."""


class KernelError(QwenkitError, RuntimeError):
    """A native kernel cannot be built or was called with arguments it does not take."""


class NonFiniteError(QwenkitError, ArithmeticError):
    """NaN or infinity turned up where a number was needed (a weight, a scale, a row of logits)."""


class QualityError(QwenkitError):
    """A result is worse beside what it was made of than was allowed."""


class MissingDependencyError(QwenkitError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}. "
            f"Install it with: pip install 'qwenkit[{extra}]'"
        )
        self.package = package


_NAMES_SHOWN = 16


def suggest(name: object, allowed: Iterable[str]) -> str:
    """One sentence for an unknown `name`: the nearest allowed names, or the first ones when none is
    near. What is no text but means one, such as torch.float32, is asked for as text.
    """
    names = sorted(allowed)
    if not isinstance(name, str):
        name = str(name).rpartition(".")[2]
        if name in names:
            return f"Give the text {name!r}."
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    rest = len(names) - _NAMES_SHOWN
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"Allowed: {shown}." if rest <= 0 else f"Allowed: {shown} and {rest} more."
