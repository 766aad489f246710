r"""One engine in a process of its own, told over standard input what to measure.

    python -m qwenkit.bench.peers llama.cpp MODEL --options '{"threads": 2, …}'

A request is a line of JSON, the fields of `spec.Work`; the answer is a line {"seconds": …,
"peak_bytes": …}. Or it is those of `spec.Load`, and the answer has "times" in place of seconds.
Separate processes keep one engine's threads and memory out of the other's figures. With
`--prepare TARGET` it writes the engine's own files of MODEL there instead, and ends.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from qwenkit.bench.peers import llama_cpp, onnxruntime, openvino, own, transformers, vllm
from qwenkit.bench.peers.spec import Engine, Load, Options, Work

ENGINES: dict[str, Callable[[str, Options], Engine]] = {
    "qwenkit": own.Qwenkit,
    "llama.cpp": llama_cpp.LlamaCpp,
    "onnxruntime": onnxruntime.OnnxRuntime,
    "openvino": openvino.OpenVino,
    "vllm": vllm.Vllm,
    "transformers": transformers.Transformers,
}
PREPARERS: dict[str, Callable[[Path, Path, Options], None]] = {
    "onnxruntime": onnxruntime.prepare,
    "openvino": openvino.prepare,
    "vllm": vllm.prepare,
}


def peak_bytes() -> int:
    """The most memory this process had resident, mapped files included (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) * 1024 if found else 0


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until they end."""

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    answer({"version": engine.version, "setting": engine.setting})
    for line in requests:
        answer(_measure(engine, json.loads(line)) | {"peak_bytes": peak_bytes()})


def _measure(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if "arrivals" in request:
        play = getattr(engine, "play", None)
        if play is None:
            raise RuntimeError("is measured under no load")
        return {"times": play(Load.from_json(request))}
    work = Work(**request)
    if work.measure == "prefill":
        return {"seconds": engine.prefill(work.tokens)}
    return {"seconds": engine.decode(work.tokens, work.streams, work.context)}


def main() -> None:
    """Make the engine that the command line names and serve it, or prepare its files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("model")
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("--prepare", type=Path)
    arguments = parser.parse_args()
    options = Options.from_json(arguments.options)
    answers, sys.stdout = sys.stdout, sys.stderr  # engines print; the protocol's line is ours alone
    if arguments.prepare is not None:
        PREPARERS[arguments.engine](Path(arguments.model), arguments.prepare, options)
    else:
        serve(ENGINES[arguments.engine](arguments.model, options), sys.stdin, answers)


if __name__ == "__main__":
    main()
