"""`cmx eval`: results of one model and of two, and arguments that it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import BASE

from cmx_jax import cli
from cmx_jax.analysis.eval import evaluate
from cmx_jax.analysis.eval import evaluation_text as report
from cmx_jax.analysis.eval.results import Evaluation
from cmx_jax.analysis.eval.skills import Item, Skill
from cmx_jax.serving.deploy.model import locate

pytestmark = pytest.mark.slow

WORDS = ("list", "module", "class", "string", "object", "method")


def _repeat(rng: np.random.Generator) -> Item:
    first, second = rng.choice(WORDS, 2, replace=False)
    return Item(f"The {first}. The {first}. The", (f" {second}", f" {first}"), 1)


def _write(rng: np.random.Generator) -> Item:
    return Item(f"Return the {rng.choice(WORDS)}. Return", (" the",))


class Counted(Skill):
    """Items of one generator."""

    def items(self, seed: int, count: int) -> list[Item]:
        rng = np.random.default_rng(seed)
        return [self.make(rng) for _ in range(count)]


SKILLS = (Counted("repeat", "which word stood there", 0.5, _repeat), Counted("write", "a word", 0.0, _write))


@pytest.fixture(autouse=True)
def skills(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "SKILLS", SKILLS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("Return a list of the names in the module.\n" * 20)
    return str(path)


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("int8") / "tiny-int8")
    assert cli.main(["convert", "tiny", path, "--dtype", "int8", "--json"]) == 0
    return path


@pytest.fixture
def results(monkeypatch) -> list[Evaluation]:
    """Results of the command, before they become JSON."""
    results, run = [], evaluate.evaluate

    def evaluated(*models, **options) -> Evaluation:
        results.append(run(*models, **options))
        return results[-1]

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    return results


def run(capsys, *arguments: str) -> str:
    assert cli.main(["eval", *arguments, "--ranks", "2"]) == 0
    return capsys.readouterr().out


def test_evaluation_text_names_model_and_runs(capsys, text, results) -> None:
    options = ("tiny", "--items", "12", "--seed", "3", "--text", text, "--window", "32")
    result = json.loads(run(capsys, *options, "--json"))
    assert result["suite"] == "all"
    assert result["against"] is None
    assert result["not_run"] == ["lm_eval"]
    assert result["model"]["name"] == "tiny"
    assert {"BF16", "F32"} == set(result["model"]["stored"])
    assert (result["model"]["dtype"], result["model"]["ranks"]) == ("float32", 2)
    skills = result["skills"]
    assert (skills["seed"], skills["items_per_skill"], skills["items"]) == (3, 12, 24)
    repeat, write = skills["by_skill"]
    assert repeat["accuracy"]["low"] > 0.5  # better than chance
    mean = (repeat["accuracy"]["value"] + write["accuracy"]["value"]) / 2
    assert skills["mean"]["accuracy"]["value"] == pytest.approx(mean)
    assert "difference" not in repeat
    assert result["text"]["window"] == 32
    assert result["text"]["model"]["perplexity"] > 1
    table = report.render(results[-1])
    for part in ("stored as BF16 100%", "float32 on 2 ranks (lanes)", "seed 3: 2 skills of 12 items", text):
        assert part in table
    assert "not run: public benchmarks (--suite lm-eval:TASK)" in table
    assert "against" not in table


def test_quantization_changes_predicted_values(capsys, text, int8, results) -> None:
    options = ("tiny", "--against", int8, "--items", "12", "--text", text, "--window", "32")
    result = json.loads(run(capsys, *options, "--json"))
    assert "INT8 per channel" in result["against"]["stored"]
    for row in (*result["skills"]["by_skill"], result["skills"]["mean"]):
        change, flips = row["difference"], row["wrong_to_right"] - row["right_to_wrong"]
        assert change["low"] <= change["value"] <= change["high"]
        assert change["value"] == pytest.approx(flips / row.get("items", 24))
        assert row["falls"] == (change["high"] < 0)
        assert 0 < row["p_value"] <= 1
    against = result["text"]["against"]
    assert 1e-4 < against["kl_divergence"]["value"] < 0.1
    assert 0.8 < against["top1_agreement"] < 1
    table = report.render(results[-1])
    for part in (
        "INT8 per channel",
        "points [95 %]",
        "the mean does not fall",
        "KL divergence",
        "top-1 agreement",
    ):
        assert part in table


def test_accuracy_loss_is_reported(capsys, monkeypatch) -> None:
    """The same model against one that forgot: every second item it knew."""

    def forgetful(llm, items, progress) -> evaluate.Answers:
        calls.append(llm)
        return evaluate.Answers(np.arange(len(items)) % len(calls) == 0, 7 * len(items))

    calls: list = []
    monkeypatch.setattr(evaluate, "answered", forgetful)
    table = run(capsys, "tiny", "--against", "tiny", "--suite", "skills", "--items", "40")
    assert "the mean falls by more than its interval; skills that do: repeat, write" in table
    assert "-50.0 [" in table
    assert table.count("  falls\n") == 3
    assert "not run: held-out text (--suite text)" in table


def other_tokenizer(path: Path) -> str:
    for file in locate("tiny").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"][-1:] = []
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(path)


def without_tokenizer(path: Path) -> str:
    for name in ("config.json", "model.safetensors"):
        (path / name).symlink_to(BASE / name)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny", "--suite", "mmlu"],
            "suite 'mmlu' is unknown, expected one of ['skills', 'text', 'all'] or",
        ),
        (["tiny", "--suite", "lm-eval:"], "suite 'lm-eval:' is unknown"),
        (["tiny", "--items", "0"], "items is 0, expected 1 to 10000"),
        (["tiny", "--seed", "-1"], "seed is -1, expected zero or more"),
        (["tiny", "--suite", "skills", "--text", "x"], "suite 'skills' reads no text, but a text is given"),
        (
            ["tiny", "--suite", "skills", "--window", "9"],
            "suite 'skills' reads no text, but a window is given",
        ),
        (["tiny", "--text", "/nowhere"], "/nowhere: cannot be read (No such file or directory)"),
        (
            ["tiny", "--text", str(BASE / "config.json"), "--window", "513", "--suite", "text"],
            "window is 513, expected 2 to the model's context",
        ),
        (["nowhere"], "model 'nowhere' is neither a directory nor"),
        (["tiny", "--against", "nowhere"], "model 'nowhere' is neither a directory nor"),
        (["tiny", "--against", other_tokenizer], "have different tokenizers or vocabularies"),
        ([without_tokenizer, "--suite", "skills"], "has no tokenizer.json"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, message) -> None:
    arguments = [argument(tmp_path) if callable(argument) else argument for argument in arguments]
    assert cli.main(["eval", *arguments, "--ranks", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
