"""Chat templates: the text of one is a program by a stranger.

Checked beside what `oracle` says: rendering ends within its bound of time, its result within its
bound of size, and the program opens no file, imports nothing and runs no code.
"""

from __future__ import annotations

import random
import time

from fuzz import oracle
from fuzz.mutators import mutate_bytes
from octavo.errors import CheckpointError
from octavo.text import chat_template, sandbox
from octavo.text.chat_template import ChatTemplate

INSTRUMENTED = ("octavo.text", "jinja2")
MAX_LEN = 8 << 10

sandbox.MAX_RENDER_S = 0.2
chat_template.MAX_OUTPUT_CHARS = 1 << 20
sandbox.MAX_WORK = 4 << 20
_SLACK_S = 1.0
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "2"]}}}
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi <b> \u00e9 " * 5},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1"},
]
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def check(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    template = None
    with oracle.judged(len(data)):
        template = ChatTemplate(text, "<s>", "</s>")
    if template is None:
        return
    began_s = time.monotonic()
    with oracle.judged(len(data) + sandbox.MAX_WORK // 32, strict=True):
        result = template.render(_MESSAGES, tools=_TOOLS, enable_thinking=True)
        oracle.expect(len(result) <= chat_template.MAX_OUTPUT_CHARS, "too long a result")
    took_s = time.monotonic() - began_s
    oracle.expect(took_s < sandbox.MAX_RENDER_S + _SLACK_S, f"rendering took {took_s:.1f} s")


def seeds() -> list[bytes]:
    """What templates are made of, whole templates, and known ways to misbehave."""
    return [text.encode() for text in (*_TEMPLATES, *_ATTACKS)]


_TEMPLATES = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- set ns = namespace(text='', n=0) -%}{%- for m in messages if m.role != 'system' -%}"
    "{%- set ns.text = ns.text ~ m.content + '\\n' -%}{%- set ns.n = ns.n + loop.index * 2 -%}"
    "{%- endfor -%}{{ ns.text | trim }}{{ ns.n }}",
    "{% macro show(x, depth=0) %}{% for k, v in x.items() %}{{ k }}={{ v | tojson(indent=2) }},"
    "{% endfor %}{{ caller() if caller }}{% endmacro %}{% for t in tools %}{{ show(t.function) }}"
    "{% endfor %}{% call show({'a': 1}) %}x{% endcall %}",
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}"
    "{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content.strip().split('</think>')[-1].lstrip('\\n') if m.content is string }}"
    "{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ '%s %d' % ('a', 3) }}{{ '{:>5}'.format('x') }}{{ ('a' * 3).upper().replace('A', 'b') }}",
    "{% set x %}a{{ messages | length }}{% endset %}{{ x | upper | indent(4) | replace('A', 'B') }}"
    "{% filter lower %}ABC{% endfilter %}{{ [3, 1] | sort | first }}{{ {'b': 1} | dictsort }}"
    "{% for i in range(5) recursive %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
)
_ATTACKS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{{ ('a' * 99999) * 99999 }}",
    "{{ 'a'.ljust(999999999) }}{{ 'a' | center(999999999) }}{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}{{ '\\t'.expandtabs(999999999) }}{{ 'a' | indent(999999999) }}",
    "{{ 1.5 | round(999999999, 'ceil') }}{{ [1] | batch(999999999, 0) | list }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}"
    "{{ ('b' * 99999).join(range(99999) | map('string')) }}",
    "{% set ns = namespace(g=[1]) %}{% for i in range(99999) %}"
    "{% set ns.g = ns.g | map('string') %}{% endfor %}",
    "{% set ns = namespace(g=[1]) %}{% for i in range(99999) %}{% set ns.g = [ns.g] %}{% endfor %}"
    "{{ ns.g | string }}{{ ns.g == [1] }}{{ ns.g | tojson }}",
    "{{ lipsum(n=99999) }}{{ lipsum.__globals__ }}{{ cycler.__init__ }}{{ self.__init__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}{{ [].sort.__self__ }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% block a %}{{ self.a() }}{% endblock %}{% include 'x' %}{% import 'x' as y %}",
    "{{ '{0.__class__}'.format(1) }}{{ '%(a)s' % {'a': 1} }}{{ messages | attr('__class__') }}",
    "{{" + "(" * 120 + "1" + ")" * 120 + "}}",
    "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
)
_PIECES = (
    *("{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", "|", "~", "+", "*", "**", "%", "//", "("),
    *(")", "[", "]", ":", ",", ".", "'", "'a'", "99999", "999999999", "-1", "0", "1e308", "not "),
    *(" if ", " else ", " is ", " in ", " and ", "{% for i in range(99999) %}", "{% endfor %}"),
    *("{% set ns = namespace(x='x') %}", "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = [ns.x] %}"),
    *("ns.x", "messages", "message", "tools", "i", "loop", "loop.index", "self", "caller()"),
    *("| list", "| join", "| map('upper')", "| tojson", "| string", "| sort", "| unique", "| sum"),
    *(
        "| replace('a', 'aa')",
        "| center(99999)",
        "| format(1)",
        "| batch(3)",
        "| slice(3)",
        "| groupby",
    ),
    *(
        "| round(99)",
        "| indent(99)",
        "| wordwrap",
        "| truncate(9)",
        "| urlize",
        "| select",
        "| items",
    ),
    *("| xmlattr", "| striptags", "| reverse", "| random", "| pprint", "| attr('x')", "| length"),
    *(".format(1)", ".join(messages)", ".replace('a', 'aa')", ".split('a')", ".ljust(99999)"),
    *(
        ".__class__",
        ".items()",
        ".encode()",
        ".translate({97: 'aa'})",
        "[::-1]",
        "[0]",
        "| default(1)",
    ),
    *(
        "{% macro f(x) %}",
        "{% endmacro %}",
        "f(f)",
        "{% filter upper %}",
        "{% endfilter %}",
        "dict(a=1)",
    ),
    *("{% if true %}", "{% endif %}", "{% break %}", "{% generation %}", "{% endgeneration %}"),
    *(
        "{% raw %}",
        "{% endraw %}",
        "{% set x %}",
        "{% endset %}",
        "{% call f() %}",
        "{% endcall %}",
    ),
    *(
        "{% with %}",
        "{% endwith %}",
        "{% autoescape true %}",
        "{% endautoescape %}",
        "range(99999)",
    ),
    *("cycler(1)", "joiner()", "lipsum()", "strftime_now('%Y')", "raise_exception('x')"),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Put in, move or take out pieces at the seams of the template's own."""
    text = data.decode("utf-8", "replace")
    seams = [0, *(i for i in range(len(text)) if not text[max(i - 1, 0) : i + 1].isalnum())]
    at, other = rng.choice(seams), rng.choice(seams)
    low, high = min(at, other), max(at, other)
    match rng.randrange(6):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            text = text[:low] + text[high:] if high - low < 60 else text[:at] + text[at + 9 :]
        case 2:
            text = text[:at] + text[low : min(high, low + 80)] + text[at:]
        case 3:
            whole = rng.choice((*_TEMPLATES, *_ATTACKS))
            text = text[:at] + whole + text[at:]
        case _:
            text = text[:at] + rng.choice(_PIECES) + text[at:]
    return text.encode("utf-8", "replace")


def check_seeds() -> None:
    for text in _TEMPLATES:
        try:
            ChatTemplate(text)
        except CheckpointError as error:
            raise oracle.ViolationError(f"a seed is refused: {error}") from error
