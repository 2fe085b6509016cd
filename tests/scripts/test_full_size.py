"""The script that compiles full-size steps: what it counts, and what it says without the TPU compiler."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

from cmx_jax.mesh import expert_parallel
from cmx_jax.model.families import preset

SCRIPT = Path(__file__).parents[2] / "scripts" / "full_size.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_die_memory_equals_paper(script: ModuleType) -> None:
    """Of 320 ranks: weights in BF16 are twice the paper's INT8."""
    c = preset("deepseek-r1")
    layout = expert_parallel(320, c.n_routed_experts, wire="int8", mailbox_rows=0)
    found = script.by_layout(c, layout, batch=48, length=4096, prefill=False, drafts=0)
    for name in ("experts", "attention", "dense FFN"):
        assert found[name] == pytest.approx(2 * script.PAPER["decode"][name], rel=0.01)
    for name in ("embedding, head", "cache"):
        assert found[name] == pytest.approx(script.PAPER["decode"][name], rel=0.01)
    steps = script.by_layout(c, layout, batch=48, length=4096, prefill=False)  # a sequence brings two tokens
    assert steps["combine buffer"] == script.PAPER["decode"]["combine buffer"]
    # 6 bytes behind the token where the paper pads to 512
    assert steps["dispatch buffer"] == 320 * 96 * (7168 + 6)


def test_int8_rows_take_half_of_the_cache(script: ModuleType) -> None:
    c = preset("deepseek-r1")
    assert script.page_bytes(c, 1, "auto") == 61 * 1152
    assert script.page_bytes(c, 1, "int8") == 61 * (576 + 2 * 4)
    layout = expert_parallel(320, c.n_routed_experts, wire="int8", mailbox_rows=0)
    found = script.by_layout(c, layout, 48, 4096, prefill=False, drafts=0, kv_cache_dtype="int8")
    assert found["cache"] == 48 * 4096 * 61 * 584


SCHEDULE = """\
HloModule jit_decode_step, is_scheduled=true

%body (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %all-to-all-start.1 = ((s8[8,4]{1,0:T(8,128)(4,1)}), s8[8,4], u32[]{:S(2)}) all-to-all-start(%copy.7), \
metadata={op_name="jit(f)/while/body/Stream0/Dispatch/all_to_all" stack_frame_id=1}
  %copy.8 = s8[8,4]{1,0} copy(%copy.7), metadata={op_name="jit(f)/while/body/Stream1/Dispatch/gather"}
  %fusion.2 = f32[8]{0} fusion(%copy.9), kind=kLoop, metadata={op_name="jit(f)/while/body/Stream1/Gate/add"}
  %all-to-all-done.1 = s8[8,4]{1,0} all-to-all-done(%all-to-all-start.1), metadata={op_name="x/Stream0/y"}
  %all-gather-start = (s8[4], s8[8,4]) all-gather-start(%copy.9), metadata={op_name="jit(f)/Stream1/z"}
  %while.3 = (s32[], bf16[8,4]{1,0}) while(%tuple), metadata={op_name="jit(f)/Stream1/MLP/while"}
  %all-to-all-start.4 = (s8[8,4], s8[8,4]) all-to-all-start(%copy.8), metadata={op_name="jit(f)/Stream1/z"}
  %all-gather-done = s8[8,4]{1,0} all-gather-done(%all-gather-start)
  ROOT %all-to-all-done.4 = s8[8,4]{1,0} all-to-all-done(%all-to-all-start.4)
}
"""


def test_work_beside_collectives_is_counted(script: ModuleType) -> None:
    """One beside work of the other stream, one beside work of its own, one beside nothing but a copy."""
    expected = {"async_collectives": 3, "with_work_between": 2, "with_work_of_another_stream": 1}
    assert script.overlap(SCHEDULE) == expected


def test_synchronous_collectives_overlap_nothing(script: ModuleType) -> None:
    text = SCHEDULE.replace("-start", "").replace("-done", "")
    assert not any(script.overlap(text).values())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is here")
def test_without_the_compiler_it_says_how_to_install_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--target", "v5p:4x4x10"])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of this process's JAX
    assert script.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("the TPU compiler is missing: pip install 'cmx_jax[tpu-aot]'")
