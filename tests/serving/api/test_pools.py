"""Pools are carved again while they serve: texts stay those of the offline model, nothing is lost."""

import threading
import time
from dataclasses import replace

import pytest
from serving.api.running import Running, start_server

from cmx_jax.cli import main
from cmx_jax.serving.deploy.deployment import pools
from cmx_jax.serving.deploy.recipe import Recipe, plain

pytestmark = pytest.mark.slow

ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def server():
    """Small instances on lanes; the carving is the supernode's."""
    small = replace(plain(Recipe()), prefill_instances=1, sequences=1, decode_npus=8, prefill_npus=4)
    deployment = pools("tiny", small.with_engine(runner="lanes", max_model_len=64))
    with start_server(deployment, admin_keys=["admin"]) as running:
        yield running


def instances(server: Running) -> list[tuple[str, list[str], int]]:
    instances = server.http.get("/status").json()["instances"]
    return [(i["name"], i["roles"], i["first_npu"]) for i in instances]


def test_pools_change_while_serving(server: Running, llm) -> None:
    """The ratio of prefill to decode changes while requests run."""
    prompts = ["The json module", "A class is", "If the object is", "Open a file"]
    expected = [str(completion) for completion in llm.generate(prompts, max_new_tokens=24)]
    texts: dict[int, str] = {}

    def ask(n: int) -> None:
        answer = server.openai.completions.create(
            model="tiny", prompt=prompts[n % 4], max_tokens=24, temperature=0
        )
        texts[n] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for n, thread in enumerate(threads):
        thread.start()
        time.sleep(0.05)
        if n == 3:
            body = {"prefill": 3, "decode": 2, "grace_s": 0}
            assert server.http.post("/admin/pools", json=body, headers=ADMIN).json() == body
    for thread in threads:
        thread.join(120)
    assert texts == {n: expected[n % 4] for n in range(12)}
    names = [("prefill-0", ["prefill"], 16), ("prefill-1", ["prefill"], 20), ("prefill-2", ["prefill"], 24)]
    assert instances(server) == [*names, ("decode-0", ["decode"], 0), ("decode-1", ["decode"], 8)]
    assert server.idle()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prefill": 0}, "prefill: Input should be greater than or equal to 1"),
        ({"prefill": 384, "decode": 1}, "carve fewer or smaller instances"),
        ({"prefill": 1, "sides": 2}, "sides: Extra inputs are not permitted"),
    ],
)
def test_pools_invalid(server: Running, body, message) -> None:
    before = instances(server)
    answer = server.http.post("/admin/pools", json=body, headers=ADMIN)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert instances(server) == before


def test_pools_command(server: Running, capsys) -> None:
    """`cmx pools` shows and changes the instances."""
    carve = ["pools", "--url", server.url, "--admin-key", "admin", "--prefill", "2"]
    assert main(carve) == 0
    shown = capsys.readouterr().out
    assert "tiny, pools: serving" in shown
    until = time.monotonic() + 20
    while time.monotonic() < until:  # they change between two steps
        assert main(["pools", "--url", server.url]) == 0
        shown = capsys.readouterr().out
        if shown.count("decode-") == 1:
            break
    assert (shown.count("prefill-"), shown.count("decode-")) == (2, 1)
    for mistake, message in (
        (["--decode", "1"], "--decode alone"),
        (["--prefill", "1"], "the key is missing or wrong"),
        (["--url", "http://127.0.0.1:9"], "no server answers there"),
    ):
        assert main(["pools", "--url", server.url, *mistake]) == 2
        assert message in capsys.readouterr().err


def test_admin_trace(server: Running) -> None:
    """The trace has the events of requests and steps."""
    events = server.http.get("/admin/trace", headers=ADMIN).json()["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {"engine: requests", "engine: prefill-0", "engine: decode-0"} <= names
    assert {"waiting", "prefill", "transfer", "decode"} <= {e["name"] for e in events}
    assert server.http.get("/admin/trace").status_code == 401
