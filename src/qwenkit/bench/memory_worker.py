r"""One model that serves some users in a process of its own, and the memory that took.

    python -m qwenkit.bench.memory_worker '{"model": "…", "weights": "int4", "users": 8, …}'

The answer is one line of JSON, a `Measured`. Resident memory is what Linux counts as such in
/proc/self/status: anonymous pages and touched pages of files (RssAnon, RssFile), and the highest it
ever was (VmHWM), which is set back between loading and running.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.spec import prompt_ids

_STATUS = Path("/proc/self/status")
_FORGET_PEAK = Path("/proc/self/clear_refs"), "5"  # proc(5)
_ANSWER_TOKENS = 16  # all together, so that their step is recorded and repeated, as in a chat
_BLOCK_TOKENS = 16  # one more for each user: the engine keeps one free for everybody who answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the process does: each of `users` sends a prompt, and has `tokens` after the answer."""

    model: str
    weights: str
    users: int
    tokens: int
    threads: int
    group_size: int | None = None
    head_weights: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Resident bytes: the most while loading, the most while running, and at the end by kind."""

    loading_bytes: int
    running_bytes: int
    anonymous_bytes: int
    file_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.loading_bytes, self.running_bytes)


def run(task: Task) -> Measured:
    """Load the model, serve the users, and read what that took. Needs Linux."""
    from qwenkit.api import LLM
    from qwenkit.engine.scheduler import LEAST_PROMPT_TOKENS

    room = (task.tokens + 2 * _BLOCK_TOKENS) * task.users
    with LLM(
        task.model,
        weights=task.weights,
        group_size=task.group_size,
        head_weights=task.head_weights,
        threads=task.threads,
        kv_cache_tokens=room,
        offline=True,
    ) as llm:
        loading = _read("VmHWM")
        _FORGET_PEAK[0].write_text(_FORGET_PEAK[1])
        # The first to answer must still be there when the last one's prompt has been computed.
        # The others' prompts are computed beside it, a part in each step.
        settings = llm.engine_settings
        part = max(settings.max_mixed_tokens - task.users, LEAST_PROMPT_TOKENS)
        steps = task.users * task.tokens // part
        answer = min(steps + _ANSWER_TOKENS, task.tokens - 1)
        sampling = {"temperature": 0.0, "max_tokens": answer, "ignore_eos": True, "seed": 0}
        vocabulary = llm.tokenizer.vocab_size
        prompts = [prompt_ids(task.tokens - answer, vocabulary, i) for i in range(task.users)]
        llm.generate(prompts, sampling)
        return Measured(loading, _read("VmHWM"), _read("RssAnon"), _read("RssFile"))


def _read(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Do the task that the command line gives as JSON, and write the answer."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(asdict(run(Task(**given)))) + "\n")


if __name__ == "__main__":
    main()
