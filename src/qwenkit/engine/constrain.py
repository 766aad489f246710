"""Constrained decoding with llguidance: which tokens may come next, for one request at a time.

A constraint is compiled in a thread of its own, within a time. What the compiler can be given is
bounded before (`grammar_text`, the sizes in `types/constraint.py`) and while it works (llguidance's
own limits), so that no constraint takes much time or memory, or more stack than there is.

The vocabulary that is compiled for is the tokenizer's and one id more, the end of the grammar. So
which of the real ids end an output is each request's own matter.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from qwenkit.engine.grammar_text import check_levels, choice_regex
from qwenkit.errors import MissingDependencyError, RequestError
from qwenkit.types.constraint import SPACES, Constraint
from qwenkit.types.protocols import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bools = NDArray[numpy.bool_]

COMPILE_TIMEOUT_S = 2.0
_MOST_AT_ONCE = 2
_LONGEST_REASON = 300
_PIECE = 1_000
_STACK_BYTES = 64 << 20  # address space, several times what MOST_LEVELS take
_STACK_LOCK = threading.Lock()  # Python has one stack size for all threads that start
# llguidance's own defaults are ten times as large; these keep memory and a step's time small.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Matcher:
    """Follows one request's output through its grammar.

    Before each token `mask` says which may come, after it `consume` takes note. `stop_ids` end the
    output: they may come exactly where the grammar may end, whatever text they stand for. Other
    control tokens never may, but for those that show in the text, such as <tool_call>, where a
    grammar names them.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        field: str,
        vocab_size: int,
        closed: Iterable[int],
        stops: set[int],
    ) -> None:
        self._matcher = matcher
        self._field = field
        self._vocab_size = vocab_size
        self._closed = frozenset(closed) | stops
        self._closed_ids = numpy.array(sorted(self._closed), numpy.int64)
        self._stops = stops
        self._stop_ids = numpy.array(sorted(stops), numpy.int64)
        self._stopped = False

    @property
    def may_end(self) -> bool:
        """True where the output so far keeps the whole constraint."""
        return self._stopped or self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """True where it does and nothing can follow but a stop token."""
        return self._stopped or (self._matcher.is_stopped() and self._matcher.is_accepting())

    def mask(self) -> Bools:
        """Which ids may come next: bool [vocab_size].

        Raises RequestError when none may, or when finding out takes more than its limits allow.
        """
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        self._check()
        allowed = numpy.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
        allowed[self._closed_ids] = False
        if self.may_end:
            allowed[self._stop_ids] = True
        if not allowed.any():
            raise RequestError(self._field, "no token of the vocabulary keeps to it from here on.")
        return allowed

    def consume(self, token_id: int) -> None:
        """Take the token that came; nothing follows a stop token. Raises RequestError for one that
        `mask` does not allow.
        """
        allowed = self.may_end if token_id in self._stops else token_id not in self._closed
        if allowed and token_id in self._stops:
            self._stopped = True
        elif not allowed or self._stopped or not self._matcher.consume_token(token_id):
            self._check()
            raise RequestError(self._field, f"token {token_id} does not keep to it.")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(self._field, f"cannot be followed: {_reason(self._matcher)}.")


class Grammars:
    """Compiles constraints for one tokenizer, of whose ids those below `vocab_size` are sampled.

    Any thread may ask. Nothing that is compiled is shared or kept: copies of an llguidance matcher
    have one lexer in common, whose table of states grows with every text and is bounded, so that
    one request could use up what another needs. Compiling again takes about a millisecond.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._vocabulary = tokenizer
        self._vocab_size = vocab_size
        self._control = {i for i in tokenizer.control_tokens.values() if i < vocab_size}
        self._hidden = {i for i in self._control if not tokenizer.stream().push(i)}
        self._tokenizer: LLTokenizer | None = None
        self._making = threading.Lock()  # of the tokenizer, which takes a moment
        self._turns = threading.BoundedSemaphore(_MOST_AT_ONCE)

    def matcher(self, constraint: Constraint, stop_ids: Iterable[int]) -> Matcher:
        """A matcher at the start of an output that ends with one of `stop_ids`.

        Takes up to `COMPILE_TIMEOUT_S`, and waits for others that compile. Raises RequestError
        when the constraint cannot be compiled, MissingDependencyError without llguidance.
        """
        field = constraint.field
        check_levels(constraint)
        tokenizer = self._made_tokenizer()
        self._turns.acquire()
        compiled = _in_time(field, self._turns, lambda: _compile(tokenizer, constraint, field))
        matcher = Matcher(compiled, field, self._vocab_size, self._hidden, set(stop_ids))
        matcher.mask()  # refused now if nothing may come
        return matcher

    def _made_tokenizer(self) -> LLTokenizer:
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._vocabulary, self._vocab_size, self._control)
            return self._tokenizer


class _Vocabulary:
    """A tokenizer as llguidance wants it: see `llguidance.TokenizerWrapper`."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, control: set[int]) -> None:
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b"<end of the grammar>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [*sorted(control), vocab_size]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):  # asked once, to find out whether bytes are taken
            raise TypeError("expected a text")
        # What must come may be long, and only its first token is asked for in earnest.
        starts = range(0, len(text), _PIECE)
        return [i for start in starts for i in self._tokenizer.encode(text[start : start + _PIECE])]


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise MissingDependencyError(
            "llguidance", "guided", "a constraint on the output"
        ) from error


def _tokenizer(tokenizer: Tokenizer, vocab_size: int, control: set[int]) -> LLTokenizer:
    library = _library()
    vocabulary = library.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, control))
    made: LLTokenizer = library.LLTokenizer(vocabulary, eos_token=[vocab_size])
    return made


def _compile(tokenizer: LLTokenizer, constraint: Constraint, field: str) -> LLMatcher:
    """The matcher at its start, its first mask computed. Raises RequestError."""
    library = _library()
    matcher: LLMatcher = library.LLMatcher(
        tokenizer,
        _grammar(library.LLMatcher, constraint, field),
        log_level=0,
        limits=library.LLParserLimits(**_LIMITS),
    )
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        if constraint.source:
            raise _of_source(constraint, matcher.get_error())
        raise RequestError(field, f"cannot be compiled: {_reason(matcher)}.")
    return matcher


def _of_source(constraint: Constraint, error: str) -> RequestError:
    """The error of a grammar that nobody wrote: without its lines, and naming the tool whose
    arguments the place in it stands for.
    """
    place = re.match(r"at (\d+)\(\d+\): ", error)
    reason = " ".join(re.split(r"\n *\d+ \||<", error[place.end() if place else 0 :])[0].split())
    lines = (constraint.grammar or "").split("\n")
    line = lines[int(place[1]) - 1] if place and int(place[1]) <= len(lines) else ""
    rule = re.match(r"arguments_(\d+): ", line)
    field = constraint.source
    if rule and field == "tools":
        field = f"tools[{rule[1]}].function.parameters"
    return RequestError(field, f"cannot be compiled: {reason[:_LONGEST_REASON].rstrip('.')}.")


def _grammar(kind: type[LLMatcher], constraint: Constraint, field: str) -> str:
    if constraint.json_schema is not None:
        try:
            spaces: Any = {"whitespace_pattern": SPACES}
            return kind.grammar_from_json_schema(constraint.json_schema, defaults=spaces)
        except ValueError as error:
            raise RequestError(field, f"cannot be compiled: {error}.") from error
    if constraint.grammar is not None:
        return kind.grammar_from_lark(constraint.grammar)
    regex = constraint.regex if constraint.choice is None else choice_regex(constraint.choice)
    return kind.grammar_from_regex(regex or "")


def _reason(matcher: LLMatcher) -> str:
    """What a matcher in error says, in one short line and without the program's own traces."""
    text = re.split(r"<(?:backtrace|non-verbose)", matcher.get_error())[0]
    return " ".join(text.split())[:_LONGEST_REASON].rstrip(".")


def _in_time(
    field: str, turns: threading.BoundedSemaphore, work: Callable[[], LLMatcher]
) -> LLMatcher:
    """What `work` makes in a thread with a large stack, which gives back its turn when it ends.

    Raises what `work` raises, and RequestError when it has made nothing within the time.
    """
    outcomes: list[LLMatcher | Exception] = []

    def run() -> None:
        try:
            outcomes.append(work())
        except Exception as error:
            outcomes.append(error)
        finally:
            turns.release()

    thread = threading.Thread(target=run, name="qwenkit-grammar", daemon=True)
    try:
        with _STACK_LOCK:
            before = threading.stack_size(_STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
    except Exception:
        turns.release()
        raise
    thread.join(COMPILE_TIMEOUT_S)
    if not outcomes:
        raise RequestError(
            field, f"takes more than {COMPILE_TIMEOUT_S:.0f} s to compile; write a simpler one."
        )
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]
    return outcomes[0]
