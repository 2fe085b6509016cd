"""`cmx bench serve` against the real server: counts, latencies, goodput, the cache, failures."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving.api.running import Running, start_server

from cmx_jax.cli import main
from cmx_jax.serving.ems import MPServer, Pool
from cmx_jax.serving.scheduling.waiting import QueueLimits

pytestmark = pytest.mark.slow

SHORT = [
    "--random-input-len",
    "24",
    "--random-output-len",
    "8",
    "--random-range-ratio",
    "0.5",
    "--ignore-eos",
]


def bench(capsys: pytest.CaptureFixture[str], url: str, *arguments: str, code: int = 0) -> str:
    """Runs the command; returns its output."""
    assert main(["bench", "serve", "--base-url", url, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def measured(capsys: pytest.CaptureFixture[str], url: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    return json.loads(bench(capsys, url, "--json", *arguments, code=code))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that exits with 2; returns its one line of error."""
    assert main(["bench", "serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


def check(d: dict[str, Any]) -> None:
    """Compares sums and statistics of a document with those of its requests, by NumPy."""
    done = np.array([not error for error in d["errors"]])
    lens, outputs, start, ttft, e2el = (
        np.array(d[name]) for name in ("input_lens", "output_lens", "start_times", "ttfts", "e2els")
    )
    assert (d["completed"], d["failed"]) == (done.sum(), (~done).sum())
    assert d["completed"] + d["failed"] + d["interrupted"] == d["num_prompts"]
    assert (d["total_input_tokens"], d["total_output_tokens"]) == (lens.sum(), outputs.sum())
    for name, total in (
        ("request", done.sum()),
        ("output", outputs.sum()),
        ("total_token", (lens + outputs).sum()),
    ):
        assert d[f"{name}_throughput"] == pytest.approx(total / d["duration"])
    assert (start >= 0).all()
    assert (start + e2el <= d["duration"] + 1e-6).all()
    for first, gaps, whole in zip(ttft[done], np.array(d["itls"], object)[done], e2el[done], strict=True):
        assert 0 < first <= first + sum(gaps) <= whole + 1e-6
    tpot = (e2el - ttft)[done & (outputs > 1)] / (outputs - 1)[done & (outputs > 1)]
    itl = np.array([gap for gaps in d["itls"] for gap in gaps])
    for name, seconds in (("ttft", ttft[done]), ("tpot", tpot), ("itl", itl), ("e2el", e2el[done])):
        if f"mean_{name}_ms" in d:
            assert d[f"mean_{name}_ms"] == pytest.approx(1e3 * seconds.mean())
            assert d[f"median_{name}_ms"] == pytest.approx(1e3 * np.median(seconds))
            assert d[f"std_{name}_ms"] == pytest.approx(1e3 * seconds.std())
            for key in (key for key in d if key.startswith("p") and key.endswith(f"_{name}_ms")):
                q = float(key.split("_")[0][1:])
                assert d[key] == pytest.approx(1e3 * np.percentile(seconds, q))


def test_counts_and_statistics_of_random_requests(capsys, server: Running) -> None:
    rate = ["--request-rate", "40", "--num-warmups", "1", "--metric-percentiles", "50,99.9"]
    d = measured(capsys, server.url, *SHORT, "--num-prompts", "20", *rate)
    check(d)
    assert (d["completed"], d["failed"], d["interrupted"], d["model_id"]) == (20, 0, 0, "tiny")
    assert (d["request_rate"], d["max_concurrency"], d["request_goodput"]) == (40, None, None)
    assert {n for n in d if n.endswith("ttft_ms")} == {
        "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p50_ttft_ms", "p99.9_ttft_ms"
    }  # fmt: skip
    assert all(12 <= n <= 36 for n in d["input_lens"])
    assert all(4 <= n <= 12 for n in d["output_lens"])
    assert len(set(d["input_lens"])) > 5
    assert all(d["generated_texts"])
    assert (d["prefix_cache_hit_rate"], d["total_cached_tokens"], d["warnings"]) == (0, 0, [])
    assert d["mean_tokens_per_chunk"] * sum(len(x) + 1 for x in d["itls"]) == pytest.approx(
        sum(d["output_lens"])
    )


def test_goodput_counts_requests_that_meet_every_objective(capsys, server: Running, tmp_path: Path) -> None:
    options = [*SHORT, "--num-prompts", "16", "--max-concurrency", "8"]
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "first.json"]
    bench(capsys, server.url, *options, *saved)
    first = json.loads((tmp_path / "first.json").read_text())
    limits = {name: first[f"median_{name}_ms"] for name in ("ttft", "tpot", "e2el")}
    for names in (["ttft"], ["tpot", "e2el"], ["ttft", "tpot", "e2el"]):
        goodput = [f"{name}:{limits[name]}" for name in names]
        d = measured(capsys, server.url, *options, "--goodput", *goodput)
        check(d)
        seconds = {"ttft": np.array(d["ttfts"]), "e2el": np.array(d["e2els"])}
        seconds["tpot"] = (seconds["e2el"] - seconds["ttft"]) / (np.array(d["output_lens"]) - 1)
        good = np.all([1e3 * seconds[name] <= limits[name] for name in names], axis=0)
        assert d["request_goodput"] == pytest.approx(good.sum() / d["duration"])


def test_table_and_files_of_shared_prefixes(capsys, server: Running, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    traffic = [
        "--dataset-name",
        "shared-prefix",
        "--num-prefixes",
        "2",
        "--prefix-len",
        "30",
        "--suffix-len",
        "9",
    ]
    traffic += ["--output-len", "5", "--num-prompts", "6", "--ignore-eos", "--max-concurrency", "3"]
    options = [
        "--goodput",
        "ttft:60000",
        "--percentile-metrics",
        "ttft,itl",
        "--endpoint",
        "/v1/chat/completions",
    ]
    options += ["--save-result", "--plot-timeline", "picture.svg"]
    text = bench(capsys, server.url, *traffic, *options)
    rows = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())
    }
    assert (rows["Successful requests"], rows["Failed requests"]) == ("6", "0")
    assert (rows["Total input tokens"], rows["Total generated tokens"]) == (str(6 * 39), str(6 * 5))
    assert rows["Prefix cache hit rate (%)"] == "0.00"
    assert rows["Request goodput (req/s)"] == rows["Request throughput (req/s)"]
    assert "Mean TTFT (ms)" in rows
    assert "Mean E2EL (ms)" not in rows
    assert "ITL is the gap between chunks" in text
    [saved] = tmp_path.glob("openai-chat-infqps-concurrency3-tiny-*.json")
    check(json.loads(saved.read_text()))
    assert "6 of 6 requests completed" in (tmp_path / "picture.svg").read_text()


def test_trace_is_replayed_at_its_times(capsys, server: Running, tmp_path: Path) -> None:
    rows = [(0, 960, [1, 2]), (4000, 1024, [1, 3]), (8000, 320, [])]
    lines = [
        json.dumps({"timestamp": t, "input_length": n, "output_length": 60, "hash_ids": ids})
        for t, n, ids in rows
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    scales = ["--input-scale", "0.0625", "--output-scale", "0.1", "--time-scale", "0.1", "--ignore-eos"]
    trace = ["--dataset-name", "mooncake", "--dataset-path", str(tmp_path / "trace.jsonl")]
    d = measured(capsys, server.url, *trace, *scales)
    check(d)
    assert (d["input_lens"], d["output_lens"]) == ([60, 64, 20], [6, 6, 6])
    assert all(due <= start < due + 0.3 for start, due in zip(d["start_times"], (0, 0.4, 0.8), strict=True))
    assert (d["num_prompts"], d["request_rate"]) == (3, None)


def test_warm_prefix_cache_is_a_warning(capsys, deployment, tmp_path: Path) -> None:
    engine = deployment.engine
    block, before = engine.instances[0].capacity.page_width, engine.mover.context
    pool = Pool({"here": MPServer(tmp_path / "disk", dram=1 << 24, disk=1 << 26)})
    deployment.cache(pool, block)
    try:
        with start_server(deployment) as running:
            options = [
                "--random-input-len",
                str(2 * block + 5),
                "--random-output-len",
                "4",
                "--num-prompts",
                "5",
            ]
            cold, warm = (measured(capsys, running.url, *options, "--max-concurrency", "1") for _ in range(2))
            assert (cold["total_cached_tokens"], cold["warnings"]) == (0, [])
            assert warm["total_cached_tokens"] == 5 * 2 * block
            assert warm["prefix_cache_hit_rate"] == pytest.approx(2 * block / (2 * block + 5))
            assert "came out of a prefix cache" in warm["warnings"][0]
            assert warm["generated_texts"] == cold["generated_texts"]
            text = bench(capsys, running.url, *options)
            assert "\nwarning: " in text
    finally:
        engine.mover.context = before
        pool.close()


def test_overload_counts_as_failures(capsys, server: Running, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server.context.deployment.engine, "limits", QueueLimits(max_num_queued_reqs=2))
    options = [*SHORT, "--num-prompts", "30", "--plot-timeline", str(tmp_path / "timeline.png")]
    d = measured(capsys, server.url, *options)
    check(d)
    assert d["failed"] > 0
    assert d["completed"] > 0
    [failure] = d["failures"]
    assert (failure["reason"], failure["count"]) == ("HTTP 429", d["failed"])
    assert "the queue is full" in failure["first"]
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_exit_code_is_1_if_no_request_completes(capsys, server: Running, monkeypatch) -> None:
    text = bench(capsys, server.url, *SHORT, "--num-prompts", "3", "--request-timeout-s", "0.001", code=1)
    assert "failed: 3 x timeout: not finished within 0.001 s" in text


def test_interrupt_keeps_the_measurement(server: Running) -> None:
    # processes that a shell starts in the background ignore SIGINT
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from cmx_jax.cli import main; sys.exit(main())"
    )
    flags = [*SHORT, "--num-prompts", "2000", "--request-rate", "10", "--json"]
    command = [sys.executable, "-c", code, "bench", "serve", "--base-url", server.url, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            before = finished(server)
            while finished(server) < before + 5:
                assert run.poll() is None, run.stderr.read()
                time.sleep(0.05)
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=20)
        finally:
            run.kill()
    assert (run.returncode, err) == (130, "")
    d = json.loads(out)
    check(d)
    assert d["completed"] > 0  # the last answers may not have been read
    assert d["interrupted"] > 1000
    assert d["failed"] == 0
    assert server.idle()  # the server ended the cancelled requests


def finished(server: Running) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if 'finished_reason="length"' in line)


def test_numbers_are_printed_if_a_file_cannot_be_written(capsys, server: Running, tmp_path: Path) -> None:
    files = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "x" * 255]
    assert main(["bench", "serve", "--base-url", server.url, *SHORT, "--num-prompts", "2", *files]) == 2
    captured = capsys.readouterr()
    assert "Successful requests:" in captured.out
    assert "cannot be written: File name too long" in captured.err
    assert not list(tmp_path.iterdir())


def test_wrong_api_key_is_one_line(capsys, deployment) -> None:
    with start_server(deployment, api_keys=["right"]) as running:
        line = refused(capsys, "--base-url", running.url, "--api-key", "wrong", *SHORT)
        assert "refuses the API key (the key is missing or wrong" in line
        d = measured(capsys, running.url, "--api-key", "right", *SHORT, "--num-prompts", "2")
        assert d["completed"] == 2


def test_api_keys_of_the_environment(capsys, deployment, monkeypatch) -> None:
    with start_server(deployment, api_keys=["right"]) as running:
        for name in ("OPENAI_API_KEY", "CMX_API_KEY"):
            monkeypatch.setenv(name, "right")
            assert measured(capsys, running.url, *SHORT, "--num-prompts", "1")["completed"] == 1
            monkeypatch.setenv(name, "wrong")
        assert "refuses the API key" in refused(capsys, "--base-url", running.url, *SHORT)


def test_missing_server_is_one_line(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = refused(capsys, "--port", str(port))
    assert f"no server answers at http://127.0.0.1:{port} (" in line
    assert "start it (cmx serve MODEL), or say where it is by --base-url" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "other"), "model 'other' is not served at"),
        ((), "request 1 has 1024 tokens and asks for 128, expected at most the model's 512 together"),
        (("--tokenizer", "/nowhere"), "no tokenizer at '/nowhere'"),
        (("--max-concurrency", "0", *SHORT), "max_concurrency is 0, expected at least 1"),
    ],
)
def test_flags_that_do_not_fit_the_server_are_one_line(capsys, server, arguments, message: str) -> None:
    assert message in refused(capsys, "--base-url", server.url, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--endpoint", "/v2"), "endpoint is '/v2', expected /v1/completions or /v1/chat/completions"),
        (("--api-key", "ä"), "the API key holds a character that no header can carry"),
        (("--num-prompts", "0"), "num_prompts is 0, expected at least 1"),
        (("--temperature", "nan"), "temperature is nan, expected at least 0"),
        (("--seed", "-1"), "seed is -1, expected at least 0"),
        (("--request-timeout-s", "0"), "request_timeout_s is 0, expected above zero"),
        (("--request-rate", "0"), "rate is 0, expected above zero"),
        (("--burstiness", "-1"), "burstiness is -1, expected above zero"),
        (("--random-range-ratio", "1"), "range_ratio is 1, expected zero or more, below 1"),
        (("--random-input-len", "0"), "a prompt's length is 0, expected at least 1"),
        (("--prefix-len", "3"), "--prefix-len is for --dataset-name shared-prefix: leave it out"),
        (("--dataset-name", "mooncake"), "needs --dataset-path FILE"),
        (("--dataset-name", "mooncake", "--dataset-path", "/no"), "--dataset-path /no: No such file"),
        (("--dataset-name", "mooncake", "--dataset-path", "/no", "--request-rate", "1"), "has its own times"),
        (("--goodput", "itl:5"), "goodput is 'itl:5', expected ttft:MS, tpot:MS or e2el:MS"),
        (("--goodput", "ttft"), "goodput is 'ttft', expected"),
        (("--percentile-metrics", "x"), "percentile_metrics is 'x', expected some of ttft,tpot,itl,e2el"),
        (("--metric-percentiles", "101"), "metric_percentiles is '101', expected numbers from 0 to 100"),
        (("--result-dir", "/"), "--result-dir is given without --save-result: give both"),
        (("--save-result", "--result-dir", "/no"), "/no is not a directory: make it first"),
        (("--plot-timeline", "/no/x.png"), "/no is not a directory: make it first"),
        (("--plot-timeline", "x.pdf"), "--plot-timeline x.pdf: expected a file that ends with .png or .svg"),
    ],
)
def test_wrong_flags_are_one_line_before_any_request(capsys, arguments, message: str) -> None:
    assert message in refused(capsys, "--base-url", "http://127.0.0.1:9", *arguments)
