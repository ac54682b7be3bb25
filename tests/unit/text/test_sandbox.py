"""Templates that want too much time or memory: each is refused, quickly, and with little memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from octavo.errors import CheckpointError, InvalidRequestError
from octavo.text import sandbox
from octavo.text.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate


def repeat(body: str, start: str, turns: int = 99999) -> str:
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({turns}) %}}{body}{{% endfor %}}"
    )


GREEDY = {
    "loops without output": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "doubling by ~": repeat("{% set ns.x = ns.x ~ ns.x %}", "'xx'"),
    "doubling by +": repeat("{% set ns.x = ns.x + ns.x %}", "'xx'"),
    "doubling a list": repeat("{% set ns.x = ns.x + ns.x %}", "[1]"),
    "doubling by nesting": repeat("{% set ns.x = [ns.x, ns.x] %}", "1") + "{{ ns.x }}",
    "doubling by dict": repeat("{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "1"),
    "doubling by join": repeat("{% set ns.x = [ns.x, ns.x] | join %}", "'xx'"),
    "doubling by format": repeat("{% set ns.x = '{0}{0}'.format(ns.x) %}", "'xx'"),
    "doubling by %": repeat("{% set ns.x = '%s%s' % (ns.x, ns.x) %}", "'xx'"),
    "doubling by replace": repeat("{% set ns.x = ns.x.replace('x', 'xx') %}", "'x'"),
    "doubling by translate": repeat("{% set ns.x = ns.x.translate({120: 'xx'}) %}", "'x'"),
    "doubling by a block": repeat(
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "'x'"
    ),
    "many slices": "{% set s = 'x' * 99999 %}" + repeat("{% set ns.x = ns.x + [s[1:]] %}", "[]"),
    "text of its own": "{% set s %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endset %}",
    "product": "{{ ('a' * 99999) * 99999 }}",
    "product of lists": "{{ [('a' * 99999)] * 99999 * 2 }}{{ ([0] * 99999) * 99999 }}",
    "width of %": "{{ '%999999999d' % 1 }}",
    "width of a filter": "{{ '%999999999d' | format(1) }}",
    "width of format": "{{ '{:>999999999}'.format(1) }}",
    "nested width": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "padding": "{{ 'a'.ljust(999999999) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "indent": "{{ ('\\n' * 99999) | indent(99999) }}",
    "JSON indent": "{{ [1, [2, [3]]] | tojson(indent=999999999) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ ('b' * 99999).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | map('string') | join('b' * 99999) }}",
    "same text often": "{{ ([0] * 99999) | map('default', 'b' * 99999, true) | list }}",
    "batches": "{{ [1] | batch(99999, 'b' * 99999) | list }}",
    "rounding": "{{ 1.5 | round(999999999, 'ceil') }}",
    "generators in generators": repeat("{% set ns.x = ns.x | map('string') %}", "[1]")
    + "{{ ns.x }}",
    "deep lists": repeat("{% set ns.x = [ns.x] %}", "1") + "{{ ns.x == ns.x }}{{ ns.x }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", GREEDY)
def test_it_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.3)
    monkeypatch.setattr(sandbox, "MAX_WORK", 4 << 20)
    monkeypatch.setattr("octavo.text.chat_template.MAX_OUTPUT_CHARS", 1 << 20)
    template = ChatTemplate(GREEDY[name])
    tracemalloc.start()
    began_s = time.thread_time()
    try:
        with pytest.raises(InvalidRequestError, match=r"refuses this conversation|too long"):
            template.render([])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 << 20
    assert time.thread_time() - began_s < 3


@pytest.mark.parametrize(
    "template",
    [
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
        "{% if a %}" * 2000 + "{% endif %}" * 2000,
        "x" * (MAX_TEMPLATE_CHARS + 1),
        "{{ x | xmlattr }}",
    ],
)
def test_what_cannot_be_compiled_is_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 'a' ~ 1 ~ none }}{{ 'a' * 3 }}{{ 2 ** 8 }}{{ 7 % 4 }}", "a1Noneaaa2563"),
        ("{{ '%s-%05.1f%%' % ('x', 2.5) }}{{ '{:>4}|{a}'.format(1, a=2) }}", "x-002.5%   1|2"),
        ("{{ [1, 2] + [3] }}{{ (1, 2) }}{{ {'a': [1]} }}", "[1, 2, 3](1, 2){'a': [1]}"),
        (
            "{% set a, b = (1, 2) %}{{ b }}"
            "{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
            "2x1",
        ),
        (
            "{{ ['b', 'a'] | sort | join('-') }}{{ 'a,b'.split(',') | map('upper') | list }}",
            "a-b['A', 'B']",
        ),
        ("{{ 'abc'[::-1] }}{{ [1, 2, 3][1:] }}{{ 'abc'[0] }}", "cba[2, 3]a"),
        (
            "{{ '-'.join(['a', 'b']) }}{{ 'x\ny' | indent(2) }}{{ 'xyx' | replace('x', 'z', 1) }}",
            "a-bx\n  yzyx",
        ),
        (
            "{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}b{% endcall %}",
            "<1b>",
        ),
        ("{% for i in [3, 1] if i > 1 %}{{ loop.index }}{{ i }}{% else %}none{% endfor %}", "13"),
        (
            "{% for i in [[1, [2]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
            "12",
        ),
        (
            "{{ [1] | batch(2, 0) | list }}{{ 1.25 | round(1) }}{{ x | default(1000000) }}",
            "[[1, 0]]1.21000000",
        ),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set y %}q{% endset %}{{ y }}", "ABq"),
        (
            "{{ namespace(a=1).a }}{{ dict(a=1) }}{{ {'b': 1} | tojson(indent=2) }}",
            "1{'a': 1}{\n  \"b\": 1\n}",
        ),
    ],
)
def test_metering_changes_nothing_else(template: str, expected: str) -> None:
    assert ChatTemplate(template).render([]) == expected


def test_a_long_conversation_is_within_the_budget() -> None:
    template = ChatTemplate(
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}"
        "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
        "{{ '<|' + m.role + '|>' ~ m.content | trim }}{{ users | length }}{%- endfor -%}"
    )
    messages = [{"role": "user", "content": "hello world " * 400} for _ in range(200)]
    assert len(template.render(messages)) > 900_000
