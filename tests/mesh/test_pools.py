"""Carving a supernode into instances that never overlap."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.errors import CmxError
from cmx_jax.mesh import CLOUDMATRIX384, carve

WHOLE_NODES = st.integers(1, 20).map(lambda nodes: nodes * 8)


def test_default_is_paper_deployment() -> None:
    pools = carve()
    assert [(s.name, s.start, s.npus) for s in pools.decode] == [("decode-0", 0, 160)]
    assert [(s.name, s.start, s.npus) for s in pools.prefill] == [
        (f"prefill-{i}", 160 + 16 * i, 16) for i in range(6)
    ]
    assert (pools.spare.start, pools.spare.npus) == (256, 128)


def test_fourteen_prefill_instances_fill_the_supernode() -> None:
    pools = carve(prefill=14)
    assert pools.prefill[-1].stop == CLOUDMATRIX384.npus
    assert pools.spare.npus == 0


@given(st.integers(0, 3), st.integers(0, 20), WHOLE_NODES, WHOLE_NODES)
@settings(deadline=None)
def test_slices_cover_every_npu_once_or_are_refused(
    decode: int, prefill: int, decode_npus: int, prefill_npus: int
) -> None:
    request = {"decode": decode, "prefill": prefill, "decode_npus": decode_npus, "prefill_npus": prefill_npus}
    needed = decode * decode_npus + prefill * prefill_npus
    if needed > 384:
        with pytest.raises(CmxError, match=f"need {needed}, CloudMatrix384 has 384"):
            carve(**request)
        return
    pools = carve(**request)
    assert [s.npus for s in pools.decode] == [decode_npus] * decode
    assert [s.npus for s in pools.prefill] == [prefill_npus] * prefill
    slices = [*pools.decode, *pools.prefill, pools.spare]
    assert [npu for s in slices for npu in range(s.start, s.stop)] == list(range(384))
    assert len({s.name for s in slices}) == len(slices)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prefill": 15}, "1 x 160 decode and 15 x 16 prefill NPUs need 400, CloudMatrix384 has 384"),
        ({"decode_npus": 12}, "decode_npus is 12, expected whole nodes of 8"),
        ({"prefill_npus": 0}, "prefill_npus is 0, expected whole nodes of 8"),
        ({"prefill_npus": -8}, "prefill_npus is -8, expected whole nodes of 8"),
        ({"decode": -1}, "-1 decode and 6 prefill instances, expected zero or more"),
    ],
)
def test_carve_with_wrong_sizes_is_refused_in_one_line(request_: dict[str, int], message: str) -> None:
    with pytest.raises(CmxError) as error:
        carve(**request_)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [{"prefill_npus": 3}, {"decode_npus": 4}], ids=str)
def test_instance_spans_fewest_nodes_or_is_refused(sizes: dict[str, int]) -> None:
    with contextlib.suppress(CmxError):
        for instance in [e for pool in ("decode", "prefill") for e in carve(**sizes).as_dict()[pool]]:
            first, last = instance["nodes"]
            assert last - first + 1 == -(-instance["npus"] // 8)


def test_pools_as_dict_names_nodes_and_rest() -> None:
    entry = carve().as_dict()
    assert json.loads(json.dumps(entry)) == entry
    assert entry["decode"] == [{"name": "decode-0", "npus": 160, "first_npu": 0, "nodes": [0, 19]}]
    assert [e["nodes"] for e in entry["prefill"]] == [[20 + 2 * i, 21 + 2 * i] for i in range(6)]
    assert entry["spare"] == {"npus": 128, "prefill_instances": 8}
