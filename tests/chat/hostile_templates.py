"""A program that renders all templates that attack.

Run with the processor seconds that a template may use, renders them all and prints
one JSON object: the outcome, the processor seconds used and the growth of memory by name.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace

from chat_fakes import ControlBytes, template_record

from qwenkit.bench.reliability.hostile_templates import HOSTILE
from qwenkit.chat.render import render
from qwenkit.chat.values import Limits
from qwenkit.errors import TemplateError
from qwenkit.types.messages import Message


def outcome(source: str) -> str:
    """ "refused: …" with the reason, or "rendered: …" with the text."""
    try:
        result = render(
            [Message("user", "hi")], tokenizer=ControlBytes(), record=template_record(source)
        )
    except TemplateError as error:
        return f"refused: {error}"
    return f"rendered: {result.text[:200]}"


def main(seconds: float) -> None:
    """Render them all, one after the other."""
    usual = Limits.for_conversation
    Limits.for_conversation = lambda **given: replace(usual(**given), seconds=seconds)  # type: ignore[method-assign]
    report = {}
    for name, source in HOSTILE.items():
        memory_before, start_s = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            time.thread_time(),
        )
        result = outcome(source)
        used_s = time.thread_time() - start_s
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
        report[name] = (result, used_s, grown_kib / 1024)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(float(sys.argv[1]))
