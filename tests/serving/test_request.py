"""Request states move along the table only; parameters are checked when given."""

import itertools

import pytest

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.request import TRANSITIONS, Request, SamplingParams, State


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_the_table_s_transitions_happen(before: State, after: State) -> None:
    request = Request([1], SamplingParams(), state=before)
    if after in TRANSITIONS[before]:
        request.to(after)
        assert request.state is after
    else:
        with pytest.raises(RuntimeError, match=f"{before.name} cannot become {after.name}"):
            request.to(after)


def test_states_are_reached_from_waiting_and_reach_finished() -> None:
    reached = {State.WAITING}
    for _ in State:
        reached |= {after for before in reached for after in TRANSITIONS[before]}
    assert reached == set(State)
    assert TRANSITIONS[State.FINISHED] == frozenset()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", -0.5),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(CmxError, match=f"^{field} is .*, expected "):
        SamplingParams(**{field: value})


def test_end_token_stops_unless_ignored() -> None:
    stopping = Request([1], SamplingParams(max_tokens=3))
    assert stopping.add(7, eos=(7,))
    assert stopping.finish_reason == "stop"
    going_on = Request([1], SamplingParams(max_tokens=2, ignore_eos=True))
    assert not going_on.add(7, eos=(7,))
    assert going_on.add(7, eos=(7,))
    assert going_on.finish_reason == "length"
