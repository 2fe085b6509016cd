"""`/v1/chat/completions` by OpenAI's own client, and chat templates."""

import json

import openai
import pytest

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.template import ChatTemplate
from cmx_jax.serving.deploy.llm import LLM

GREEDY = {"model": "tiny", "temperature": 0}
TURNS = [
    {"role": "system", "content": "This is the manual."},
    {"role": "user", "content": [{"type": "text", "text": "The json "}, {"type": "text", "text": "module"}]},
]
PROMPT = "This is the manual.\n\nThe json module"


@pytest.fixture(scope="module")
def expected(llm: LLM):
    return llm.generate(PROMPT, max_new_tokens=12)[0]


@pytest.mark.slow
def test_chat_greedy(client, expected) -> None:
    """A conversation is continued as one text."""
    result = client.chat.completions.create(messages=TURNS, max_completion_tokens=12, **GREEDY)
    message = result.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert result.choices[0].finish_reason == expected.finish_reason
    assert result.usage.prompt_tokens == len(expected.prompt_tokens)
    assert result.usage.completion_tokens == len(expected.tokens)


def test_chat_stream(client, expected) -> None:
    """A stream begins with the role."""
    events = list(
        client.chat.completions.create(
            messages=TURNS, max_tokens=12, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    for index in range(2):
        deltas = [c for e in events for c in e.choices if c.index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in deltas) == expected.text
        assert [c.finish_reason for c in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == expected.finish_reason
    assert events[-1].usage.completion_tokens == 2 * len(expected.tokens)


@pytest.mark.slow
def test_chat_default_max_tokens(client, llm) -> None:
    """The rest of the context is the default."""
    result = client.chat.completions.create(
        messages=[{"role": "user", "content": "the " * 500}], extra_body={"ignore_eos": True}, **GREEDY
    )
    assert result.usage.total_tokens == 512
    assert result.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_chat_logprobs(client) -> None:
    """Log-probabilities equal those of `/v1/completions`."""
    of_chat = client.chat.completions.create(
        messages=TURNS, max_tokens=6, logprobs=True, top_logprobs=2, **GREEDY
    )
    [plain] = client.completions.create(prompt=PROMPT, max_tokens=6, logprobs=2, **GREEDY).choices
    scores = of_chat.choices[0].logprobs.content
    assert [item.token for item in scores] == plain.logprobs.tokens
    assert [item.logprob for item in scores] == plain.logprobs.token_logprobs
    assert [{t.token: t.logprob for t in item.top_logprobs} for item in scores] == plain.logprobs.top_logprobs
    assert all(bytes(item.bytes).decode() == item.token for item in scores)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ({"tools": [{"type": "function"}]}, "field 'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "field 'response_format' is not supported"),
        ({"top_logprobs": 2}, "top_logprobs is 2 without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs is 21, expected at most 20"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "both max_tokens and max_completion_tokens"),
    ],
)
def test_mistake_is_one_line(client, fields, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.post("/chat/completions", body={"messages": TURNS, **GREEDY, **fields}, cast_to=object)


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
<{{ m.role }}>{{ m.content | tojson }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
RENDERED = '<s><user>"é\\n"\n<assistant>'


@pytest.mark.parametrize(
    ("files"),
    [
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": json.dumps({"bos_token": "<s>"})},
        {"tokenizer_config.json": json.dumps({"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE})},
        {
            "tokenizer_config.json": json.dumps(
                {
                    "bos_token": "<s>",
                    "chat_template": [
                        {"name": "tools", "template": ""},
                        {"name": "default", "template": TEMPLATE},
                    ],
                }
            )
        },
    ],
)
def test_chat_template_matches_hugging_face(tmp_path, files) -> None:
    """The checkpoint's template is found, and renders the same text as Hugging Face's tokenizers."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    template = ChatTemplate.read(tmp_path)
    assert template.render([{"role": "user", "content": "é\n"}]) == RENDERED
    with pytest.raises(CmxError, match="refuses the messages: no tools here"):
        template.render([{"role": "tool", "content": ""}])


def test_chat_template_sandbox() -> None:
    """A template cannot leave its sandbox."""
    escape = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(CmxError, match="unsafe"):
        escape.render([])
    with pytest.raises(CmxError, match="refuses"):
        ChatTemplate("{{ messages.append(1) }}", {}).render([])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chat_template.jinja", "{% if %}", "chat template is refused"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be read"),
    ],
)
def test_chat_template_broken(tmp_path, name, text, message) -> None:
    """A broken template is refused with one line."""
    (tmp_path / name).write_text(text)
    with pytest.raises(CmxError, match=message):
        ChatTemplate.read(tmp_path)


def test_chat_template_missing(tmp_path) -> None:
    """A checkpoint without a template has none."""
    assert ChatTemplate.read(tmp_path) is None


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "caf\u00e9",
        ),
        ("{{ messages[0].content | tojson(ensure_ascii=False) }}", '"caf\u00e9"'),
        (
            "{{ messages[0] | tojson(sort_keys=True, separators=(',', ':')) }}",
            '{"content":"caf\u00e9","role":"user"}',
        ),
        (
            "{% if tools is not none %}tools{% endif %}{% if documents is none %}no documents{% endif %}",
            "no documents",
        ),
    ],
)
def test_template_forms_of_transformers(source: str, text: str) -> None:
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "caf\u00e9"}]) == text


def test_answer_is_sent_back_as_it_came(client) -> None:
    """All fields of an answer, most of them null or empty, are accepted in the next call's messages."""
    answer = client.chat.completions.create(messages=TURNS, max_tokens=4, **GREEDY)
    earlier = answer.choices[0].message.model_dump()
    nulls = {"refusal": None, "audio": None, "function_call": None, "tool_calls": [], "annotations": None}
    turns = [
        *TURNS,
        earlier | nulls,
        {"role": "assistant", "content": None},
        {"role": "user", "content": "on"},
    ]
    assert client.chat.completions.create(messages=turns, max_tokens=2, **GREEDY).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": None}, "content is null, expected a text, or a list of parts"),
        ({"role": "user", "content": 3}, "messages.0.content: .*expected a text, or a list of parts"),
        (
            {"role": "user", "content": "x", "tool_calls": [{"id": "1"}]},
            "tool_calls: .*the field is not supported",
        ),
    ],
)
def test_message_mistakes(client, message, error) -> None:
    with pytest.raises(openai.BadRequestError, match=error):
        client.post("/chat/completions", body={"messages": [message], **GREEDY}, cast_to=object)


def test_continuous_usage(client) -> None:
    """With `continuous_usage_stats` each event has the usage so far, and the last one the whole."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(
        messages=TURNS, max_tokens=5, stream=True, stream_options=options, **GREEDY
    )
    counts = [event.usage.completion_tokens for event in stream]
    assert counts[0] == 0
    assert counts[-1] == 5
    assert counts == sorted(counts)
