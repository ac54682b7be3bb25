from __future__ import annotations

import pytest

from octavo.errors import CheckpointError, InvalidRequestError
from octavo.text import chat_template
from octavo.text.chat_template import ChatTemplate, need_chat_template

CHATML = """{{ bos_token }}{% for message in messages %}
    <|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_render():
    template = ChatTemplate(CHATML, "<s>", "</s>")
    text = template.render([{"role": "user", "content": "hi"}])
    assert text.replace("    ", "") == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert not template.render(
        [{"role": "user", "content": "hi"}], add_generation_prompt=False
    ).endswith("assistant\n")


def test_text_parts_are_joined():
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"
    assert template.render([{"role": "assistant", "content": None}]) == "None"


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": "x"}], [{"type": "text"}], 7, [3]]
)
def test_other_content_is_refused(content):
    with pytest.raises(InvalidRequestError):
        ChatTemplate("x").render([{"role": "user", "content": content}])


def test_what_hub_templates_use():
    template = ChatTemplate(
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ tools | tojson }}{{ {'b': '<é>'} | tojson(indent=1) }}"
        "{% generation %}[{{ strftime_now('%Y') | length }}]{% endgeneration %}"
        "{{ switch }}{{ eos_token }}"
    )
    text = template.render([], tools=[{"name": "f'<&>"}], switch="on")
    assert text == '012[{"name": "f\'<&>"}]{\n "b": "<é>"\n}[4]on'


def test_the_templates_own_message():
    template = ChatTemplate("{{ raise_exception('Roles must alternate!') }}")
    with pytest.raises(InvalidRequestError, match="Roles must alternate!") as caught:
        template.render([])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{{ 'x' * 10**9 }}",
        "{{ 9 ** 99999999 }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 / 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_the_sandbox_holds(attack):
    with pytest.raises(InvalidRequestError):
        ChatTemplate(attack).render([])


def test_output_is_limited(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 1000)
    endless = "{% for i in range(90000) %}xxxxxxxxxx{{ i }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="too long"):
        ChatTemplate(endless).render([])


def test_broken_template():
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        ChatTemplate("{% for %}")


def test_no_template():
    with pytest.raises(InvalidRequestError, match="completions"):
        need_chat_template(None)


@pytest.mark.slow
def test_equals_transformers(smollm2_dir):
    from transformers import AutoTokenizer

    messages = [
        {"role": "user", "content": "What is 2 < 3?"},
        {"role": "assistant", "content": "True."},
        {"role": "user", "content": "Спасибо"},
    ]
    reference = AutoTokenizer.from_pretrained(smollm2_dir)
    ours = ChatTemplate((smollm2_dir / "chat_template.jinja").read_text())
    for begin in (True, False):
        expected = reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=begin
        )
        assert ours.render(messages, add_generation_prompt=begin) == expected
