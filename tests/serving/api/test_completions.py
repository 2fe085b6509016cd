"""`/v1/completions` by OpenAI's own client: what is served is what the Python API gives."""

import numpy as np
import openai
import pytest
from reference.dense import logits
from serving.api.running import Running

from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import locate

PROMPTS = ["The json module", "A dictionary is", "Return a list of"]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list:
    return llm.generate(PROMPTS, max_new_tokens=24)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def test_completion_greedy(client, expected) -> None:
    """Greedy text equals that of the Python API."""
    result = client.completions.create(prompt=PROMPTS, max_tokens=24, **GREEDY)
    assert [c.index for c in result.choices] == [0, 1, 2]
    assert [c.text for c in result.choices] == [e.text for e in expected]
    assert [c.finish_reason for c in result.choices] == [e.finish_reason for e in expected]
    usage = result.usage
    assert usage.prompt_tokens == sum(len(e.prompt_tokens) for e in expected)
    assert usage.completion_tokens == sum(len(e.tokens) for e in expected)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_completion_token_ids(client, expected) -> None:
    """Prompts may be token ids."""
    ids = [e.prompt_tokens for e in expected]
    for prompt, texts in ((ids, expected), (ids[1], expected[1:2])):
        result = client.completions.create(prompt=prompt, max_tokens=24, **GREEDY)
        assert [c.text for c in result.choices] == [e.text for e in texts]


def test_completion_stream(client, expected) -> None:
    """The pieces of a stream form the same text."""
    texts, ends, usages = [""] * 3, [None] * 3, []
    options = {"include_usage": True}
    for event in client.completions.create(
        prompt=PROMPTS, max_tokens=24, stream=True, stream_options=options, **GREEDY
    ):
        usages.append(event.usage)
        for choice in event.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
    assert texts == [e.text for e in expected]
    assert ends == [e.finish_reason for e in expected]
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1].completion_tokens == sum(len(e.tokens) for e in expected)


@pytest.mark.slow
def test_completion_choices_and_seeds(client, llm) -> None:
    """Choices are those of consecutive seeds, in order."""
    draw = {"temperature": 0.9, "top_p": 0.95}
    result = client.completions.create(
        model="tiny", prompt=PROMPTS[:2], max_tokens=8, n=2, seed=2**32 - 1, **draw
    )
    expected = [
        llm.generate(prompt, max_new_tokens=8, seed=seed, **draw)[0].text
        for prompt in PROMPTS[:2]
        for seed in (2**32 - 1, 0)
    ]
    assert [c.text for c in result.choices] == expected


def test_completion_without_seed(client) -> None:
    """Answers without a seed differ."""
    ask = {"model": "tiny", "prompt": "It is", "max_tokens": 12}
    assert len({client.completions.create(**ask).choices[0].text for _ in range(3)}) > 1


def test_completion_default_max_tokens(client) -> None:
    """The default of `max_tokens` is 16."""
    result = client.completions.create(prompt="It is", extra_body={"ignore_eos": True}, **GREEDY)
    assert result.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_completion_stop_string(server: Running, expected, stream) -> None:
    """The text ends before a stop string, and the request ends with it."""
    full = expected[0].text
    stop = full[10:13]
    result = server.openai.completions.create(
        prompt=PROMPTS[0], max_tokens=500, stop=["\x00", stop], stream=stream, **GREEDY
    )
    events = list(result) if stream else [result]
    assert "".join(e.choices[0].text for e in events) == full[: full.index(stop)]
    assert events[-1].choices[0].finish_reason == "stop"
    assert server.idle()


def test_completion_stop_token_ids(client, expected) -> None:
    """Stop token ids end the text."""
    tokens = expected[0].tokens
    stop = tokens[5]
    result = client.completions.create(
        prompt=PROMPTS[0], max_tokens=24, extra_body={"stop_token_ids": [stop]}, **GREEDY
    )
    assert result.usage.completion_tokens == tokens.index(stop) + 1
    assert result.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client, expected, stream) -> None:
    """Log-probabilities of generated tokens equal those of the dense reference."""
    prompt, tokens = expected[0].prompt_tokens, expected[0].tokens[:10]
    events = client.completions.create(prompt=prompt, max_tokens=10, logprobs=3, stream=stream, **GREEDY)
    parts = [e.choices[0].logprobs for e in (events if stream else [events]) if e.choices[0].logprobs]
    scores = log_softmax(logits(locate("tiny"), np.asarray(prompt + tokens)))[len(prompt) - 1 : -1]
    got = [x for p in parts for x in p.token_logprobs]
    np.testing.assert_allclose(got, scores[np.arange(10), tokens], atol=1e-4)
    for top, row in zip([x for p in parts for x in p.top_logprobs], scores, strict=True):
        np.testing.assert_allclose(sorted(top.values()), np.sort(row)[-3:], atol=1e-4)
    texts = [x for p in parts for x in p.tokens]
    offsets = [x for p in parts for x in p.text_offset]
    assert offsets == [len("".join(texts[:i])) for i in range(10)]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
def test_completion_echo_logprobs(client, llm, max_tokens, stream) -> None:
    """`echo` scores prompts in the way that lm-evaluation-harness uses."""
    prompts = [llm.model.encode(p) for p in ("The json module", "Open a file" * 20)]
    events = client.completions.create(
        prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, seed=1234, stream=stream, **GREEDY
    )
    choices = [c for e in (events if stream else [events]) for c in e.choices]
    for i, ids in enumerate(prompts):
        parts = [c for c in choices if c.index == i]
        assert "".join(p.text for p in parts).startswith(llm.model.decode(ids))
        assert parts[-1].finish_reason == "length"
        tokens, top, texts, offsets = [], [], [], []
        for part in parts:
            tokens += part.logprobs.token_logprobs
            top += part.logprobs.top_logprobs
            texts += part.logprobs.tokens
            offsets += part.logprobs.text_offset
        assert len(tokens) == len(top) == len(ids) + max_tokens
        assert tokens[0] is None
        assert top[0] is None
        scores = log_softmax(logits(locate("tiny"), np.asarray(ids)))
        np.testing.assert_allclose(tokens[1 : len(ids)], scores[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        np.testing.assert_allclose(
            [max(item.values()) for item in top[1 : len(ids)]], scores[:-1].max(axis=1), atol=1e-4
        )
        assert offsets == [len("".join(texts[:n])) for n in range(len(texts))]


def test_completion_echo(client, expected) -> None:
    """`echo` without `logprobs` repeats the prompt."""
    result = client.completions.create(prompt=PROMPTS[0], max_tokens=4, echo=True, **GREEDY)
    assert result.choices[0].text.startswith(PROMPTS[0])
    assert expected[0].text.startswith(result.choices[0].text.removeprefix(PROMPTS[0]))
    assert result.choices[0].logprobs is None


MISTAKES = [
    ({"prompt": ""}, "the prompt is empty, expected at least one token"),
    ({"prompt": []}, "prompt: expected text, token ids, or a list"),
    ({"prompt": [[]]}, "the prompt is empty"),
    ({"prompt": [True]}, "prompt: expected text, token ids, or a list"),
    ({"prompt": ["a", [1]]}, "prompt: expected text, token ids, or a list"),
    ({"prompt": [2048]}, r"token id 2048, expected ids in \[0, 2048\)"),
    ({"prompt": "x " * 600}, "exceeds max_model_len, 512 tokens"),
    ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
    ({"max_tokens": 512}, "and max_tokens 512 exceeds max_model_len, 512 tokens"),
    ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
    ({"temperature": -1}, "temperature is -1.0, expected zero or more"),
    ({"top_p": -0.5}, "top_p is -0.5, expected in"),
    ({"seed": -(2**63) - 1}, "seed: Input should be greater than"),
    ({"n": 0}, "n: Input should be greater than or equal to 1"),
    ({"n": 257}, "257 choices, expected at most 256"),
    ({"logprobs": 21}, "logprobs is 21, expected at most 20"),
    ({"logprobs": 21, "echo": True, "max_tokens": 0}, "logprobs is 21, expected at most 20"),
    ({"stop": [""]}, "stop.0: String should have at least 1 character"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop: List should have at most 4 items"),
    ({"presence_penalty": 0.5}, "field 'presence_penalty' is not supported: leave it out"),
    ({"logit_bias": {"5": 1}}, "field 'logit_bias' is not supported"),
    ({"best_of": 2}, "field 'best_of' is not supported"),
    ({"max_token": 5}, "field 'max_token' is unknown: leave it out"),
    ({"stream_options": {"include_usage": True}}, "field 'stream_options' is for streams only"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES)
def test_completion_invalid(client, fields, message) -> None:
    """A mistake is reported in one line, in OpenAI's form."""
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.post("/completions", body={"prompt": "x", **GREEDY, **fields}, cast_to=object)
    error = caught.value.response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_completion_neutral_fields(client) -> None:
    """Fields that change nothing are accepted."""
    harmless = {"user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": None}
    client.post("/completions", body={"prompt": "x", "max_tokens": 1, **GREEDY, **harmless}, cast_to=object)


def test_completion_another_model(client) -> None:
    """A request for another model gets 404."""
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here, expected 'tiny'"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-4")
    assert client.models.retrieve("tiny").id == "tiny"
    assert [m.id for m in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "echo": None,
            "suffix": None,
            "best_of": None,
            "logit_bias": None,
            "priority": None,
            "unheard_of": None,
        },
        {"seed": -1, "temperature": 1.0},
        {"seed": -(2**63), "temperature": 1.0},
        {"min_tokens": 3, "ignore_eos": True},
        {"ignore_eos": None, "min_tokens": None, "stop": None, "n": None, "top_k": None, "user": None},
    ],
)
def test_fields_as_clients_send_them(client, fields) -> None:
    """Null is the same as absent, seeds have 64 bits and a sign."""
    body = {"prompt": PROMPTS[0], "max_tokens": 4, **fields}
    answer = client.post("/completions", body=body, cast_to=object)
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"min_tokens": 3}, "'min_tokens' is supported only with ignore_eos"),
        ({"min_tokens": 5, "ignore_eos": True}, "min_tokens is 5, expected at most max_tokens, 4"),
        ({"top_p": 1.5}, r"top_p is 1.5, expected in \[0, 1\]"),
    ],
)
def test_field_mistakes(client, fields, error) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 4, **fields}
    with pytest.raises(openai.BadRequestError, match=error):
        client.post("/completions", body=body, cast_to=object)


def test_top_p_of_zero_is_greedy(client, expected) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=8, temperature=1.5, top_p=0, seed=3
    )
    greedy = client.completions.create(prompt=PROMPTS[0], max_tokens=8, **GREEDY)
    assert answer.choices[0].text == greedy.choices[0].text


def test_offsets_are_those_of_the_text(client) -> None:
    """Also where a character has several tokens, whose bytes together are the text's."""
    text = "na\u00efve \U0001f600 caf\u00e9 end"
    [choice] = client.completions.create(prompt=text, echo=True, max_tokens=0, logprobs=1, **GREEDY).choices
    scores = choice.logprobs
    assert choice.text == text
    assert scores.text_offset == sorted(scores.text_offset)
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token)
    parts = [token for token in scores.tokens if token.startswith("bytes:")]
    assert parts
    joined = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in scores.tokens
    )
    assert joined.decode() == text
