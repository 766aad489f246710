"""A served model that says what a script says: its token ids are put in at the sampler, so that
renderer, engine, parser and stream all run.

As a process, all arguments but the first as for `qwenkit serve`:

    python -m scripted_server SCRIPT [MODEL] [--port 0 …]

SCRIPT is a .py file with `reply(prompt: str) -> str`, or JSON: a list of [pattern, reply], of which
the first whose pattern is found in the prompt is said. The prompt is the whole text that the model
is given, control tokens by their names. A reply may name control tokens too; the token that ends a
turn comes by itself. A prompt for which there is no reply is an error of its request.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.api.session import Session
from qwenkit.engine import active
from qwenkit.engine.logprobs import in_fp32, token_logprob
from qwenkit.engine.sampler import Choice
from qwenkit.errors import QwenkitError
from qwenkit.types.sampling import SamplingParams

Script = Callable[[str], str]


class ScriptedSampler:
    """In the place of `engine.sampler.Sampler`: one request's tokens are those of its reply."""

    joins = False  # with no native choice for several rows at once

    def __init__(
        self,
        session: Session,
        script: Script,
        sampling: SamplingParams,
        *,
        prompt_ids: tuple[int, ...],
        seed: int,
        vocab_size: int,
        stop_ids: Any,
    ) -> None:
        tokenizer, record = session.tokenizer, session.record
        text = script(tokenizer.decode(list(prompt_ids)))
        ids = tokenizer.encode(text, allowed_special="all")
        self._coming = iter([*ids, record.stop_token_ids[0]])
        self._logprobs = sampling.logprobs
        self._vocab_size = vocab_size

    def choose(self, logits: torch.Tensor, allowed: Any = None) -> Choice:
        token_id = next(self._coming)
        if allowed is not None and not allowed[token_id]:
            raise QwenkitError(f"the scripted token {token_id} is not allowed by the constraint")
        if self._logprobs is None:
            return Choice(token_id)
        row = in_fp32(logits)
        known = token_logprob(row, token_id, count=self._logprobs, vocab_size=self._vocab_size)
        return Choice(token_id, known.logprob, known.top)


def read_script(path: str | Path) -> Script:
    """The script in a file."""
    if str(path).endswith(".py"):
        reply: Script = runpy.run_path(str(path))["reply"]
        return reply
    return script_of(json.loads(Path(path).read_text(encoding="utf-8")))


def script_of(rules: list[Any]) -> Script:
    """The script of pairs of a pattern and a reply."""

    def reply(prompt: str) -> str:
        for pattern, text in rules:
            if re.search(pattern, prompt, re.DOTALL):
                return str(text)
        raise QwenkitError(f"the script has no reply to {prompt[-300:]!r}")

    return reply


@contextmanager
def scripted(session: Session, script: Script) -> Iterator[None]:
    """Inside this block `session` says what the script says."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(active, "Sampler", partial(ScriptedSampler, session, script))
        yield


def main() -> None:
    """`qwenkit serve` with a script."""
    from qwenkit.cli import loading
    from qwenkit.cli import main as program

    script, load = read_script(sys.argv[1]), loading.load_served_model

    def load_scripted(*given: Any) -> Any:
        llm = load(*given)
        active.Sampler = partial(ScriptedSampler, llm, script)  # type: ignore[misc, assignment]
        return llm

    loading.load_served_model = load_scripted
    sys.argv = ["qwenkit", "serve", *sys.argv[2:]]
    program.main()


if __name__ == "__main__":
    main()
