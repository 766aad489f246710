r"""Renders every hostile template with a model's own tokenizer, in a process of its own.

    python -m qwenkit.bench.reliability.template_worker MODEL_FOLDER

Each line on standard output is JSON: the template's name, what came of it, processor seconds, and
by how much the most memory grew. The last line says whether all were rendered.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenkit.api import LLM
from qwenkit.bench.reliability.hostile_templates import HOSTILE
from qwenkit.bench.server_process import status_bytes
from qwenkit.chat.render import render
from qwenkit.errors import TemplateError
from qwenkit.types.messages import Message

_REFUSED = "refused"


def main() -> None:
    """Render them all, one after the other."""
    out, sys.stdout = sys.stdout, sys.stderr
    with LLM(sys.argv[1], threads=1, offline=True) as llm:
        _rendered(llm, "{{ messages[0].content }}")  # what is made once is made
        for name, source in HOSTILE.items():
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before, start_s = _status("VmRSS"), time.thread_time()
            line: dict[str, Any] = {"name": name, "outcome": _rendered(llm, source)}
            line["seconds"] = time.thread_time() - start_s
            line["bytes"] = _status("VmHWM") - before
            out.write(json.dumps(line) + "\n")
            out.flush()
    out.write(json.dumps({"done": len(HOSTILE)}) + "\n")


def _status(name: str) -> int:
    return status_bytes("self", name)


def _rendered(llm: LLM, source: str) -> str:
    record = replace(llm.record, chat_format="template", chat_template=source)
    try:
        render([Message("user", "hi")], tokenizer=llm.tokenizer, record=record)
    except TemplateError as error:
        return f"{_REFUSED}: {error}"
    return "rendered"


if __name__ == "__main__":
    main()
