"""Six processes say what the model says offline: greedy, sampled, alone, together, whole and in parts."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving.ems.stores import eventually
from serving.roles.cluster import BLOCK, Cluster, text
from serving.roles.conftest import TOKENS

from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.scheduling.request import SamplingParams


def test_greedy_text_is_that_of_the_model_and_blocks_are_shared(cluster: Cluster, asked, offline) -> None:
    long = asked[1]
    with cluster.asked(asked, max_tokens=TOKENS) as answers:
        assert [text(answer) for answer in answers] == offline

    def cached() -> int:
        answer = cluster.ask(long, max_tokens=TOKENS)
        assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == offline[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    eventually(lambda: cached() == (len(long) - 1) // BLOCK * BLOCK)
    prefill, decode = ([p.status() for p in of] for of in (cluster.prefill, cluster.decode))
    assert sum(status["counts"]["prefix_hits"] for status in prefill) > 0
    assert all(status["kv"]["offered"] > 0 for status in prefill)
    assert all(status["counts"]["steps"] > 0 for status in decode)
    assert all(0 < status["counts"]["accepted"] < status["counts"]["drafts"] for status in decode)


def test_streams_end_when_their_client_leaves_and_others_go_on(cluster: Cluster, asked, offline) -> None:
    def stream(index: int) -> tuple[str, int] | None:
        body: dict[str, Any] = {
            "prompt": asked[index],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
        }
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        found, parts, tokens = "", 0, 0
        with cluster.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if not line or line == "data: [DONE]":
                    continue
                document = json.loads(line.removeprefix("data: "))
                found += "".join(choice["text"] for choice in document["choices"])
                tokens = (document["usage"] or {}).get("completion_tokens", 0)
                parts += 1
                if index % 2 and parts == index:
                    return None
        assert parts > 10
        return found, tokens

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(stream, range(len(asked))))
    assert found == [None if index % 2 else of for index, of in enumerate(offline)]


def test_sampled_text_depends_on_the_seed_only(cluster: Cluster, llm: LLM, asked) -> None:
    given = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    [whole] = llm.generate(asked[3:4], max_new_tokens=30, ignore_eos=True, **given)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(cluster.ask, asked[3], max_tokens=30, **given) for _ in range(3)]
    assert [text(answer) for answer in answers] == [(whole.text, 30)] * 3


def test_logprobs_are_those_of_the_model(cluster: Cluster, llm: LLM, asked) -> None:
    prompt, params = asked[2], SamplingParams(max_tokens=9, ignore_eos=True, logprobs=3)
    request = llm.engine.submit(prompt, params)
    llm.engine.run()
    found = cluster.ask(prompt, max_tokens=9, logprobs=3)["choices"][0]["logprobs"]
    assert found["tokens"] == [llm.model.tokenizer.decode([token]) for token in request.tokens]
    assert found["token_logprobs"] == pytest.approx([of.logprob for of in request.logprobs], abs=1e-3)
    assert [len(top) for top in found["top_logprobs"]] == [3] * 9


def test_echo_says_of_the_models_own_tokens_what_was_said_with_them(
    cluster: Cluster, llm: LLM, asked
) -> None:
    [whole] = llm.generate(asked[:1], max_new_tokens=6, ignore_eos=True)
    said = cluster.ask(asked[0], max_tokens=6, logprobs=0)["choices"][0]
    ids = [*asked[0], *whole.tokens]
    found = cluster.ask(ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert found["text"] == llm.model.tokenizer.decode(ids, skip_special_tokens=False)
    scores = found["logprobs"]["token_logprobs"]
    assert (len(scores), scores[0]) == (len(ids), None)
    assert scores[-6:] == pytest.approx(said["logprobs"]["token_logprobs"], abs=1e-3)
