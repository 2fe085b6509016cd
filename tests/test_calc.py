"""`cmx calc` as a user calls it."""

import json

import pytest

from cmx_jax.cli import main


def test_switching_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calc", "switching", "deepseek-r1", "--instances", "4", "--obs-gb-s", "5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    tiers = document["tiers"]
    assert document["model"] == "deepseek-r1"
    assert tiers["EMS"]["cold_start_s"] == pytest.approx(document["bytes"] / 5e9)
    assert tiers["no cache"]["cold_start_s"] == pytest.approx(4 * tiers["EMS"]["cold_start_s"])
    assert document["published"]["EMS"]["cold_start_s"] == 320
    assert main(["calc", "switching"]) == 0
    assert "mean switch, s" in capsys.readouterr().out


def test_allocation_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--supernodes", "384,192", "--mean-blocks", "8", "--blocks", "5000"]
    assert main(["calc", "allocation", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(r["supernode"], r["mean_block"]) for r in document["rates"]] == [(384, 8), (192, 8)]
    assert [r["switches"] for r in document["switches"]] == [56, 28]
    assert main(["calc", "allocation", *flags]) == 0
    assert "28 switches, 100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["switching", "--instances", "0"], "instances is 0, expected more than 0"),
        (["switching", "--obs-gb-s", "-2"], "obs_gb_s is -2, expected more than 0"),
        (["switching", "--weights", "fp4"], "weights are 'fp4', expected int8 or bfloat16"),
        (["switching", "nobody"], "model 'nobody' is neither"),
        (["allocation", "--supernodes", "many"], "--supernodes is 'many', expected numbers such as 384,224"),
        (["allocation", "--supernodes", "100"], "a supernode of 100 NPUs, expected whole nodes of 8"),
        (
            ["allocation", "--mean-blocks", "500"],
            "the mean block is 500 NPUs, expected 1 to the largest, 128",
        ),
        (["allocation", "--seed", "-1"], "seed -1, expected 1 or more and zero or more"),
    ],
)
def test_nonsense_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calc", *arguments]) == 2
    message_shown = capsys.readouterr().err
    assert message_shown.count("\n") == 1
    assert message in message_shown
