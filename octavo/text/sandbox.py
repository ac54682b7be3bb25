"""Jinja for programs by strangers: they can neither reach Python's insides nor take more than their
share of time and memory.

Jinja's own sandbox hides attributes and limits `range`. Here, everything that makes text or lists
pays for it from a `Budget`: operators, calls, filters, literals, outputs, slices. What could grow
beyond its parts (`*`, `replace`, padding) pays before it is done. Every turn of a loop and every
call looks at the clock.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2.runtime
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_RENDER_S = 10.0
MAX_WORK = 256 << 20  # characters made, and _NODE for each value in a list
_NODE = 16
_MAX_FACTOR = 100_000  # as the sandbox has it for range()
_MAX_INDENT = 16
_TICK_NODES = 1 << 12

# HTML and prose: no model's prompt needs them, and their cost is hard to bound.
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that hand values on and make no text of them; others pay for their arguments' text.
_STRUCTURAL = frozenset(
    (
        *("abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby"),
        *("int", "items", "last", "length", "list", "map", "max", "min", "random", "reject"),
        *("rejectattr", "reverse", "round", "select", "selectattr", "slice", "sort", "sum"),
        "unique",
    )
)
_REPEATING = frozenset(("batch", "d", "default", "slice"))  # they can give one value many times
_WIDE = re.compile(r"\d{6}|\*")  # a width or precision in a format


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._deadline_s = time.monotonic() + MAX_RENDER_S
        self._work = MAX_WORK

    def tick(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise SecurityError(f"it takes more than {MAX_RENDER_S:g} s")

    def charge(self, amount: int) -> None:
        self._work -= amount
        if self._work < 0:
            raise SecurityError("it makes too much text")

    def charge_value(self, value: Any, *, text: bool, times: int = 1) -> None:
        """Pay for a value and all within it, as often as it occurs there; with `text`, for what it
        is as text, too.
        """
        if isinstance(value, _TEXT):
            self.charge(len(value) * times)
            return
        if not isinstance(value, _HOLDERS):
            return
        stack, count = [value], 0
        while stack:
            item = stack.pop()
            count += 1
            if count % _TICK_NODES == 0:
                self.tick()
            self.charge(_NODE * times)
            if isinstance(item, _TEXT):
                if text:
                    self.charge(len(item) * times)
            elif isinstance(item, dict):
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, _HOLDERS):
                stack += item


_TEXT: tuple[type[Any], ...] = (str, bytes)
_HOLDERS: tuple[type[Any], ...] = (
    *(list, tuple, dict, set, frozenset),
    *(type({}.keys()), type({}.values()), type({}.items())),
)
_current: ContextVar[Budget] = ContextVar("budget")


@contextlib.contextmanager
def metered() -> Iterator[None]:
    """A budget of its own for what runs inside: compiling or rendering a template."""
    token = _current.set(Budget())
    try:
        yield
    finally:
        _current.reset(token)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile with `compile_metered` and render inside `metered()`."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_pay_for_output, **options)
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.filters = {
            name: _metered_filter(name, function)
            for name, function in self.filters.items()
            if name not in _LEFT_OUT
        }

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _metered_filter(name, function)

    def compile_metered(self, text: str) -> jinja2.Template:
        """Raises what Jinja and Python's compiler raise."""
        with metered():
            return self.from_string(_Metering().visit(self.parse(text)))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        budget = _current.get()
        if operator == "%" and isinstance(left, _TEXT):
            _check_percent(left, right)
        elif operator != "+":
            _check_product(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        budget.charge_value(result, text=False)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _current.get()
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # put there by `_Metering`: a template has no name for it
            return __obj(*args)
        if isinstance(owner, _TEXT):
            args = tuple(map(_as_list, args))
            _check_growth(__obj.__name__, owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.charge_value(result, text=False)
        return result

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        _current.get().tick()
        return super().call_test(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        layout, inner = str(value.__self__), wrapped
        fields = layout.count("{")
        if _WIDE.search(layout) or re.search(r"\{[^}]*\{", layout.replace("{{", "")):
            raise SecurityError("the widths of a format are too large")

        def formatted(*args: Any, **kwargs: Any) -> str:
            _current.get().charge_value((args, kwargs), text=True, times=fields)
            return inner(*args, **kwargs)

        return formatted

    # What `_Metering` puts into templates.

    def turn(self, num_chars: int) -> None:
        """A turn of a loop whose body writes so many characters of its own."""
        _current.get().charge(num_chars)

    def joined(self, *values: Any) -> str:
        _current.get().charge_value(values, text=True)
        return jinja2.runtime.str_join(values)

    def paid(self, value: Any) -> Any:
        _current.get().charge_value(value, text=False)
        return value


class _Namespace(Namespace):
    """Jinja's, whose text would hold that of all its values."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Metering(NodeTransformer):
    """Routes through the sandbox what Jinja compiles to plain Python: loops, `~`, slices and
    literals.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        num_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("turn", nodes.Const(num_chars))))
        return node.set_lineno(node.lineno, override=False)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes).set_lineno(node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":  # a target, not a value
            return node
        return _call("paid", node).set_lineno(node.lineno)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("paid", node) if isinstance(node.arg, nodes.Slice) else node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _pay_for_output(value: Any) -> Any:
    budget = _current.get()
    if isinstance(value, str):
        budget.charge(len(value))
    else:
        budget.charge_value(value, text=True)
    return value


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja's filters may take a context first; the decorator's mark is copied with the name.
    num_first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        budget = _current.get()
        budget.tick()
        first, rest = args[:num_first], tuple(map(_as_list, args[num_first:]))
        if name not in _STRUCTURAL:
            budget.charge_value((rest, kwargs), text=True)
        if name not in ("default", "d"):
            _check_growth(name, rest[0], rest[1:], kwargs)
        result = _as_list(function(*first, *rest, **kwargs))
        if name in _STRUCTURAL and name not in _REPEATING and isinstance(result, list):
            budget.charge(_NODE * len(result))
        else:
            budget.charge_value(result, text=False)
        return result

    return filtered


def _as_list(value: Any) -> Any:
    """Generators as lists: a chain of many is deeper than Python's stack."""
    return list(value) if isinstance(value, Iterator) else value


def _check_growth(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pay before a method or filter makes more of a text than its arguments are."""
    given = [*args, *(value for key, value in kwargs.items() if not key.startswith("_"))]
    sizes = [abs(arg) for arg in given if isinstance(arg, int)]
    if any(size > _MAX_FACTOR for size in sizes):
        raise SecurityError(f"an argument of {name} is too large")
    budget = _current.get()
    if name == "format":
        _check_percent(str(value), args)
    elif name == "join":
        _pay_for_join(value, given)
    elif name == "replace" and len(given) >= 2:
        found = str(value).count(str(given[0]))
        budget.charge(found * len(str(given[1])))
    elif name in ("indent", "expandtabs") and isinstance(value, _TEXT):
        text = value if isinstance(value, str) else value.decode("latin-1")
        wide = max([8, *sizes, *(len(arg) for arg in given if isinstance(arg, str))])
        budget.charge((text.count("\n") + text.count("\t") + text.count("\r") + 1) * wide)
    elif name == "translate" and given and isinstance(given[0], Mapping):
        longest = max((len(str(text)) for text in given[0].values()), default=1)
        budget.charge(len(value) * longest)
    elif name == "tojson":
        layout = [arg if isinstance(arg, int) else len(str(arg)) for arg in given if arg]
        if any(abs(size) > _MAX_INDENT for size in layout):
            raise SecurityError("tojson's indent is too large")
        budget.charge_value(value, text=False, times=_MAX_INDENT)


def _pay_for_join(value: Any, given: Sequence[Any]) -> None:
    """`separator.join(values)`, or the filter: values | join(separator)."""
    separator, values = (value, given[0]) if isinstance(value, _TEXT) else (None, value)
    if separator is None or not given:
        separator = given[0] if given else ""
    budget = _current.get()
    budget.charge_value(values, text=True)
    num_values = len(values) if hasattr(values, "__len__") else 0
    budget.charge(len(str(separator)) * num_values)


def _check_percent(layout: str | bytes, values: Any) -> None:
    text = layout if isinstance(layout, str) else layout.decode("latin-1")
    if any(_WIDE.search(width) for width in re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", text)):
        raise SecurityError("the widths of a format are too large")
    _current.get().charge_value(values, text=True, times=text.count("%"))


def _check_product(operator: str, left: Any, right: Any) -> None:
    sizes = [len(x) if isinstance(x, str | bytes | list | tuple) else x for x in (left, right)]
    if any(isinstance(size, int) and abs(size) > _MAX_FACTOR for size in sizes) or (
        operator == "**" and isinstance(right, int) and right > 64
    ):
        raise SecurityError(f"the operands of {operator} are too large")
    if operator == "*" and sizes != [left, right]:
        count = next((x for x in (left, right) if isinstance(x, int)), 1)
        content = left if isinstance(right, int) else right
        _current.get().charge_value(content, text=False, times=max(count, 0))
