"""Results of `cmx eval`: one record for each part of a suite, and their JSON document."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cmx_jax.analysis.eval.statistics import Estimate

PARTS = ("skills", "text", "lm_eval")


@dataclass(frozen=True)
class ModelDescription:
    """A model as it was run.

    Attributes:
      name: Name of the model's directory.
      path: Path of the model's directory.
      stored: Number of parameters by the type in which the checkpoint stores them.
      dtype: Type of the arithmetic.
      runner: Name of the instance's runner.
      ranks: Number of ranks.
      slots: Number of expert slots.
      exchange: Method that exchanges tokens between ranks.
      wire: Type of exchanged tokens.
    """

    name: str
    path: str
    stored: Mapping[str, int]
    dtype: str
    runner: str
    ranks: int
    slots: int
    exchange: str
    wire: str


@dataclass(frozen=True)
class Change:
    """Change of the accuracy when a second model answers the same items.

    Attributes:
      accuracy_against: Fraction of the items that the second model answers correctly.
      right_to_wrong: Number of items that only the first model answers correctly.
      wrong_to_right: Number of items that only the second model answers correctly.
      difference: Accuracy of the second model minus that of the first.
      p_value: P-value of McNemar's exact test for no change.
    """

    accuracy_against: Estimate
    right_to_wrong: int
    wrong_to_right: int
    difference: Estimate
    p_value: float

    @property
    def falls(self) -> bool:
        """Returns whether the whole interval of the difference is below zero."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Score:
    """Accuracy on some items.

    Attributes:
      accuracy: Fraction of the items that the model answers correctly.
      change: Comparison with a second model; None without one.
    """

    accuracy: Estimate
    change: Change | None = None

    def as_dict(self) -> dict[str, object]:
        change = {} if self.change is None else {**vars(self.change), "falls": self.change.falls}
        return _plain({"accuracy": self.accuracy, **change})


@dataclass(frozen=True)
class SkillScore:
    """Accuracy in one skill.

    Attributes:
      skill: Name of the skill.
      about: Description of the skill.
      chance: Accuracy of guessing.
      items: Number of items.
      score: Accuracy of the models.
    """

    skill: str
    about: str
    chance: float
    items: int
    score: Score

    def as_dict(self) -> dict[str, object]:
        row = {"skill": self.skill, "about": self.about, "chance": self.chance, "items": self.items}
        return row | self.score.as_dict()


@dataclass(frozen=True)
class SkillsResult:
    """Accuracy in all skills.

    Attributes:
      seed: Seed of the items.
      items_per_skill: Number of items per skill.
      items: Number of all items.
      tokens: Number of tokens that each model ran.
      by_skill: Accuracy in each skill.
      mean: Accuracy on all items; as skills have equally many items, the mean over skills.
    """

    seed: int
    items_per_skill: int
    items: int
    tokens: int
    by_skill: Sequence[SkillScore]
    mean: Score

    def as_dict(self) -> dict[str, object]:
        rows = [row.as_dict() for row in self.by_skill]
        return {**vars(self), "by_skill": rows, "mean": self.mean.as_dict()}


@dataclass(frozen=True)
class TextLoss:
    """Loss of a model on a text.

    Attributes:
      loss: Mean loss per token, in nats.
      perplexity: Exponential of the mean loss.
    """

    loss: Estimate
    perplexity: float


@dataclass(frozen=True)
class TextChange:
    """A second model's predictions on a text, compared with the first's.

    Attributes:
      loss: Mean loss of the second model per token, in nats.
      perplexity: Exponential of that loss.
      loss_rise: Loss of the second model minus that of the first, in nats per token.
      loss_rises: Flag; the whole interval of the rise is above zero.
      kl_divergence: Kullback-Leibler divergence of the second model from the first, in nats per token.
      top1_agreement: Fraction of positions at which both models have the same most likely token.
    """

    loss: Estimate
    perplexity: float
    loss_rise: Estimate
    loss_rises: bool
    kl_divergence: Estimate
    top1_agreement: float


@dataclass(frozen=True)
class TextResult:
    """Losses on a text, with intervals from the scatter over windows.

    Attributes:
      text: Name of the text.
      sha256: Hash of all documents.
      window: Tokens per window.
      windows: Number of windows.
      tokens_predicted: Number of predicted tokens.
      model: Loss of the model.
      against: Comparison with a second model; None without one.
    """

    text: str
    sha256: str
    window: int
    windows: int
    tokens_predicted: int
    model: TextLoss
    against: TextChange | None = None

    def as_dict(self) -> dict[str, object]:
        return {name: _plain(value) for name, value in vars(self).items() if value is not None}


Metrics = Mapping[str, Mapping[str, float | int | str]]


@dataclass(frozen=True)
class HarnessResult:
    """Numbers of lm-evaluation-harness.

    Attributes:
      version: Version of the harness.
      limit: Number of documents per task, the first ones.
      model: Values of the model by task and metric.
      against: Values of a second model by task and metric; None without one.
    """

    version: str
    limit: int
    model: Metrics
    against: Metrics | None


@dataclass(frozen=True)
class Evaluation:
    """Results of a suite for one model, or for two models on the same items.

    Attributes:
      suite: Name of the suite.
      model: Description of the model.
      against: Description of the second model; None without one.
      skills: Accuracy in the generated skills; None if they were not run.
      text: Losses on held-out text; None if it was not run.
      lm_eval: Numbers of lm-evaluation-harness; None if it was not run.
    """

    suite: str
    model: ModelDescription
    against: ModelDescription | None
    skills: SkillsResult | None = None
    text: TextResult | None = None
    lm_eval: HarnessResult | None = None

    @property
    def not_run(self) -> list[str]:
        """Names of the parts that were not run."""
        return [name for name in PARTS if getattr(self, name) is None]

    def as_dict(self) -> dict[str, object]:
        """The document that `cmx eval --json` prints; parts that were not run are left out."""
        document: dict[str, object] = {"suite": self.suite}
        document |= {"model": _plain(self.model), "against": _plain(self.against)}
        document |= {name: _plain(part) for name in PARTS if (part := getattr(self, name)) is not None}
        return document | {"not_run": self.not_run}


def _plain(value: Any) -> Any:
    """Records as dictionaries, sequences as lists, and infinite numbers (no interval) as None."""
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isinf(value) else value
