"""The timeline of a measurement: positions and lengths of its bars."""

from dataclasses import fields, replace

import numpy as np
import pytest

from cmx_jax.analysis.bench import BenchmarkSummary, RequestColumns, timeline

REQUESTS = RequestColumns(
    input_lens=[8, 8, 0],
    output_lens=[6, 4, 0],
    start_times=[1.0, 0.5, 2.0],
    ttfts=[0.5, 1.0, 0.0],
    itls=[[1.5], [1.0, 1.0, 1.0], []],
    e2els=[2.0, 4.0, 3.0],
    generated_texts=["", "", ""],
    errors=["", "", "HTTP 500: broken"],
)
SUMMARY = BenchmarkSummary(
    duration=6.0,
    completed=2,
    failed=1,
    interrupted=0,
    total_input_tokens=16,
    total_output_tokens=10,
    request_throughput=2 / 6,
    request_goodput=None,
    output_throughput=10 / 6,
    total_token_throughput=26 / 6,
    total_cached_tokens=0,
    prefix_cache_hit_rate=0.0,
    mean_tokens_per_chunk=10 / 6,
    warnings=[],
    failures=[],
    latencies={},
    requests=REQUESTS,
)


def test_bars_are_waits_and_answers_by_start() -> None:
    bars, rate = timeline(SUMMARY).axes
    bar_spans = [
        (round(bar.get_y() + 0.4), bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars.patches
    ]
    waits, answers, failed = bar_spans[:2], bar_spans[2:4], bar_spans[4:]
    assert waits == [(1, 1.0, 1.5), (0, 0.5, 1.5)]
    assert answers == [(1, 1.5, 3.0), (0, 1.5, 4.5)]
    assert failed == [(2, 2.0, 5.0)]
    assert bars.get_title(loc="left") == "2 of 3 requests completed, 1.7 output tokens/s"
    assert rate.get_xlim() == (0, 6)


def test_tokens_are_counted_when_their_chunks_came() -> None:
    [stairs] = timeline(SUMMARY).axes[1].patches
    values, edges, _ = stairs.get_data()
    tokens = dict(zip(edges[:-1].round(3).tolist(), values * np.diff(edges), strict=True))
    nonzero = {start: n for start, n in tokens.items() if n}
    assert nonzero == pytest.approx({1.5: 4.0, 2.5: 1.0, 3.0: 3.0, 3.5: 1.0, 4.5: 1.0})


def test_empty_measurement_has_picture() -> None:
    requests = RequestColumns(**{field.name: [] for field in fields(RequestColumns)})
    nothing = replace(SUMMARY, duration=0.0, completed=0, output_throughput=0.0, requests=requests)
    assert timeline(nothing).axes[0].get_title(loc="left").startswith("0 of 0 requests")
