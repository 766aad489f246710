"""Runs a checkpoint's own Jinja chat template: a stranger's program, in a cage.

The dialect is the one Hugging Face chat templates are written in (blocks trimmed, `break` and
`continue`, `raise_exception`, `strftime_now`, `tojson` without HTML escaping, `generation`
blocks). The only module that imports jinja2. What a template can reach is listed here by name:
methods, filters, tests and globals that are not listed do not exist for it. Every operation that
can be large goes through `values.Run`, which counts and measures. Must not know messages.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import filters as jinja_filters
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context, pass_environment

from qwenkit.chat.filters import TEXT_FILTERS, strftime_now
from qwenkit.chat.guard import TEXT_METHODS, Guard, planes
from qwenkit.chat.values import COMPARISON_TESTS, Limits, Run, length
from qwenkit.errors import TemplateError

_MAX_SOURCE_CHARACTERS = 49_152
_FILE_NAME = "<chat template>"
_LOOP = """changed cycle depth depth0 first index index0 last length nextitem previtem revindex
revindex0"""
_METHODS: Mapping[type, frozenset[str]] = {
    str: TEXT_METHODS | {"format"},
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    LoopContext: frozenset(_LOOP.split()),
}
_COLLECTION_FILTERS = """abs count d default dictsort first items last length list map max min
reject rejectattr reverse select selectattr sort unique"""
_TESTS = """boolean callable defined divisibleby even false filter float integer iterable mapping
none number odd sameas sequence string test true undefined"""
_REFUSED_STATEMENTS = {
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "import",
    nodes.Extends: "extends",
    nodes.ScopedEvalContextModifier: "autoescape",
}
# What a template's own mistakes, or attacks, surface as.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template: Python byte code, and the Unicode planes of the text it contains."""

    code: CodeType
    planes: frozenset[int]


@lru_cache(maxsize=32)
def compile_template(source: str) -> ChatTemplate:
    """Compile a template's text; remembered per text.

    Raises TemplateError for one that is too long, malformed, or reads other files.
    """
    if len(source) > _MAX_SOURCE_CHARACTERS:
        raise TemplateError(
            f"the chat template has {len(source):,} characters; allowed: "
            f"{_MAX_SOURCE_CHARACTERS:,}."
        )
    environment = _Environment()
    try:
        tree = environment.parse(source)
        for node in tree.find_all(tuple(_REFUSED_STATEMENTS)):
            name = _REFUSED_STATEMENTS[type(node)]
            raise TemplateError(f"line {node.lineno}: a chat template cannot use {name!r}.")
        own = planes(source)
        for constant in tree.find_all(nodes.Const):
            own |= planes(constant.value) if isinstance(constant.value, str) else set()
        return ChatTemplate(environment.compile(tree, filename=_FILE_NAME), frozenset(own))
    except TemplateError:
        raise
    except _TEMPLATE_FAULTS as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(f"the chat template is malformed: {line}{_reason(error)}") from error


def run_template(
    template: ChatTemplate, variables: Mapping[str, object], *, guard: Guard, limits: Limits
) -> str:
    """Render; the result is marked text (see `guard`).

    Raises TemplateError when the template fails, refuses the conversation, reaches for something
    that is not listed above, or passes a limit.
    """
    run = Run(guard, limits, blank=(Undefined,))
    environment = _Environment(run)
    program = jinja2.Template.from_code(environment, template.code, environment.globals)
    pieces: list[str] = []
    try:
        for piece in program.root_render_func(program.new_context(dict(variables))):
            run.made(len(piece))
            pieces.append(piece)
    except TemplateError as error:
        raise TemplateError(guard.plain(str(error))) from error
    except _TEMPLATE_FAULTS as error:
        line = _line(program, error)
        raise TemplateError(f"the chat template failed{line}: {_reason(error)}") from error
    return "".join(pieces)


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply."
    return str(error) or type(error).__name__


def _line(program: jinja2.Template, error: BaseException) -> str:
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == _FILE_NAME:
            return f" at line {program.get_corresponding_lineno(number)}"
    return ""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: a mark for trainers, rendered as if absent."""

    tags = {"generation"}  # noqa: RUF012 (how Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Generates code in which every operation of unknown size is a call of the environment."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.run.spend()")  # every pass of a loop, every macro's start
        super().blockvisit(nodes, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        left: nodes.Expr = node.expr
        for i, operand in enumerate(node.ops):
            self.write(f"{' and ' if i else '('}environment.run.compare({operand.op!r}, ")
            self.visit(left, frame)
            self.write(", ")
            self.visit(operand.expr, frame)
            self.write(")")
            left = operand.expr
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.getitem(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(nodes.Const(None) if bound is None else bound, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._admitted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._admitted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._admitted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _admitted(self, visit: Callable[..., None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.run.admit(")
        visit(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """What a template may do. With a run, for one rendering; without, for compiling."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, run: Run | None = None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be computed while compiling, outside the limits
            finalize=self._printed,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        if run is not None:
            self.run = run
        self.filters: dict[str, Any] = _FILTERS
        self.tests: dict[str, Any] = _ALL_TESTS
        self.globals = dict(_GLOBALS)

    # -- text ------------------------------------------------------------------------------------

    @pass_context  # keeps Jinja from printing constants while compiling
    def _printed(self, context: Context, value: object) -> str:
        return self.run.text(value)

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a macro or a `set` block has printed."""
        text = self.run.guard.own("").join(pieces)
        self.run.made(len(text))
        return text

    def joined(self, values: Iterable[object]) -> str:
        """The operator `~`."""
        return self.concat([self.run.text(value) for value in values])

    # -- operators -------------------------------------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make large values."""
        self.run.spend()
        if operator == "*":
            return self.run.repeated(left, right)
        if operator == "**":
            return self.run.power(left, right)
        if operator == "%":
            return self.run.percent(left, right) if isinstance(left, str) else left % right
        return self.run.added(left, right)

    # -- reaching into values --------------------------------------------------------------------

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`, slices too; then, as in Jinja, the method of that name."""
        if isinstance(argument, slice):
            self.run.spend(length(obj))
            return obj[argument]
        try:
            return obj[argument]
        except (TypeError, LookupError):
            if isinstance(argument, str):
                return self._method(obj, argument)
        return self.undefined(obj=obj, name=argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`: a listed method first, then an item."""
        if isinstance(obj, dict) and attribute not in _METHODS[dict]:
            try:
                return obj[attribute]
            except KeyError:
                return self._method(obj, attribute)
        if isinstance(obj, TemplateReference):
            return obj[attribute]
        return self._method(obj, attribute)

    def _method(self, obj: Any, name: str) -> Any:
        if isinstance(obj, Undefined):
            return getattr(obj, name)  # raises, and says which variable is missing
        for kind, names in _METHODS.items():
            if isinstance(obj, kind) and name in names:
                if not isinstance(obj, str):
                    return getattr(obj, name)
                if name == "format":
                    return partial(self.run.braces, obj)
                return getattr(self.run.guard.own(obj), name)
        if name.startswith("_"):
            raise TemplateError(f"a chat template may not reach for {name!r}.")
        if isinstance(obj, Namespace) and hasattr(obj, name):
            return getattr(obj, name)
        return self.undefined(obj=obj, name=name)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template reached."""
        __self.run.spend()
        return __self.run.admit(super().call(__context, __obj, *args, **kwargs))


def _text_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @pass_environment
    def apply(environment: _Environment, value: object, *args: Any, **kwargs: Any) -> Any:
        environment.run.spend(length(value))
        return environment.run.admit(function(environment.run, value, *args, **kwargs))

    return apply


def _collection_filter(name: str) -> Callable[..., Any]:
    """One of Jinja's own filters: charged before, measured after, never lazy."""
    function = cast(Callable[..., Any], jinja_filters.FILTERS[name])
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def apply(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        run = cast(_Environment, context.environment).run
        run.guard.check_items(length(value))
        run.spend(length(value) * 16)  # whatever it does, it does in Python for every item
        passed = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(wanted or "", ())
        return run.admit(function(*passed, value, *args, **kwargs))

    return apply


def _comparison_test(name: str) -> Callable[..., Any]:
    @pass_environment
    def test(environment: _Environment, left: Any, right: Any) -> Any:
        return environment.run.compare(name, left, right)

    return test


def _text_test(name: str) -> Callable[..., Any]:
    @pass_environment
    def test(environment: _Environment, value: object) -> Any:
        run = environment.run
        return getattr(run.guard.own(run.text(value)), name)()

    return test


@pass_environment
def _raise_exception(environment: _Environment, message: object) -> NoReturn:
    text = environment.run.text(message)
    raise TemplateError(f"the chat template refused the conversation: {text}")


# Functions, not the classes themselves: a class has attributes and items of its own.
def _dictionary(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    return Namespace(*args, **kwargs)


_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _collection_filter(name) for name in _COLLECTION_FILTERS.split()},
    **{name: _text_filter(function) for name, function in TEXT_FILTERS.items()},
}
_ALL_TESTS: dict[str, Any] = {
    **{name: TESTS[name] for name in _TESTS.split()},
    **{name: _comparison_test(operand) for name, operand in COMPARISON_TESTS.items()},
    "lower": _text_test("islower"),
    "upper": _text_test("isupper"),
}
_GLOBALS: Mapping[str, Callable[..., Any]] = {
    "dict": _dictionary,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "range": safe_range,
    "strftime_now": strftime_now,
}
