"""What is wrong with a checkpoint, in plain words: every check of the tables, one after another.

A check is a function from the facts of a checkpoint to what it finds; a new one goes into the table
of its module. Loading stops at the first fault, this goes on. Must not know how it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from qwenkit.errors import CheckpointError, QwenkitError
from qwenkit.record import read_record
from qwenkit.survey import (
    doctor_config,
    doctor_files,
    doctor_generation,
    doctor_rope,
    doctor_template,
    doctor_tokens,
    doctor_weights,
)
from qwenkit.survey.doctor_facts import Facts, Finding, fault, gather

Check = Callable[[Facts], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    *doctor_files.CHECKS,
    *doctor_config.CHECKS,
    *doctor_rope.CHECKS,
    *doctor_tokens.CHECKS,
    *doctor_template.CHECKS,
    *doctor_generation.CHECKS,
    *doctor_weights.CHECKS,
)


def examine(path: Path) -> list[Finding]:
    """All that is wrong or odd about the model folder or file at `path`, faults first.

    Raises ModelNotFoundError when nothing is there.
    """
    facts = gather(path)
    found = [finding for check in CHECKS for finding in check(facts)]
    if not any(finding.severity == "fault" for finding in found):
        found += _unexplained(facts)
    return sorted(found, key=lambda finding: finding.severity)


def _unexplained(facts: Facts) -> Iterator[Finding]:
    """What loading refuses and no check knows."""
    errors: list[QwenkitError | None] = [
        facts.opening_error,
        facts.config_error,
        facts.tokenizer_error,
    ]
    if facts.checkpoint and facts.model_config and facts.tokenizer:
        try:
            read_record(facts.checkpoint, facts.tokenizer, facts.model_config)
        except CheckpointError as error:
            errors.append(error)
    for reason in errors:
        if reason is not None:
            yield fault("does-not-load", facts.path.name, str(reason), f"无法加载：{reason}")
