"""Which answers the tables need, and how each is made (PIT sections 4.4 to 4.7, appendix K)."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pit_jax.evaluation import store
from pit_jax.evaluation.store import AnswerSet, Spec
from pit_jax.pipelines import common, improve
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.improve import Step
from pit_jax.types import PreferenceExample


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a set of answers is made.

    Attributes:
      name: of the set.
      method: chosen and rejected (of the data), policy (a model's own), or a key of `improve.METHODS`.
      stage: whose model writes them.
      of: name of the set that is improved; empty for a model's own.
      temperature: of the samples; None: that of the config.
      shuffled: each prompt gets the answer to another prompt.
    """

    name: str
    method: str
    stage: str = ""
    of: str = ""
    temperature: float | None = None
    shuffled: bool = False


def chain(method: str, stage: str, of: str, num_iterations: int, name: str | None = None) -> list[Plan]:
    """y_1, y_2, ..., each made of the one before: NAME, NAME_iteration_2, ..."""
    name = name or method
    names = [of, *chain_names(name, num_iterations)]
    return [Plan(new, method, stage, before) for before, new in zip(names, names[1:], strict=False)]


def chain_names(name: str, num_iterations: int) -> list[str]:
    """Names of y_1 .. y_K."""
    return [name, *(f"{name}_iteration_{k}" for k in range(2, num_iterations + 1))]


def at_temperature(name: str, temperature: float, default: float) -> str:
    """The name of a set that is sampled at a temperature of its own."""
    return name if temperature == default else f"{name}_t{temperature:g}"


class Maker:
    """Makes sets of answers to a split's rows, or reads those that are made."""

    def __init__(self, context: Context, split: str, rows: Sequence[PreferenceExample]):
        self.context, self.split, self.rows = context, split, rows
        self.root = context.workdir.root / "evaluation"
        self.prompts = store.digest([[row.prompt, row.chosen, row.rejected] for row in rows])
        self.sets: dict[str, AnswerSet] = {}
        self._method = functools.lru_cache(maxsize=1)(self._make_method)

    def make(self, plan: Plan) -> AnswerSet:
        """The set of a plan; what it improves must have been made."""
        if plan.name not in self.sets:
            spec = self._spec(plan)
            self.sets[plan.name] = store.answers(
                self.path(plan.name), plan.name, spec, lambda: self._answer(plan), self.context.encoder.text
            )
        return self.sets[plan.name]

    def __getitem__(self, name: str) -> AnswerSet:
        """A set that has been made."""
        return self.sets[name]

    def path(self, name: str) -> Path:
        """The file of a set."""
        return self.root / "answers" / self.split / f"{name}.jsonl"

    def _temperature(self, plan: Plan) -> float:
        return self.context.config.evaluation.temperature if plan.temperature is None else plan.temperature

    def _spec(self, plan: Plan) -> Spec:
        form = improve.form_of(self.context, plan.method)
        spec: Spec = {"method": plan.method, "prompts": self.prompts, "form": form.pop("templates")} | form
        if plan.method in ("chosen", "rejected"):
            return spec
        spec |= {
            "seed": self.context.config.seed,
            "temperature": self._temperature(plan),
            "name": plan.name,
            "iteration": self._iteration(plan),
        }
        spec |= {"models": {stage: self.context.workdir.model_digest(stage) for stage in self._stages(plan)}}
        if plan.of:
            spec |= {"of": plan.of, "of_digest": store.digest(self[plan.of].spec), "shuffled": plan.shuffled}
        return spec

    def _iteration(self, plan: Plan) -> int:
        """k of y_k."""
        return 1 + self[plan.of].spec["iteration"] if plan.of else 0

    def _stages(self, plan: Plan) -> list[str]:
        return [plan.stage, *(["r_p"] if plan.method == "rerank" else [])]

    def _make_method(self, method: str, stage: str, temperature: float) -> improve.Method:
        size = self.context.config.evaluation.batch_size
        return improve.make_method(self.context, method, temperature, size, stage)

    def _answer(self, plan: Plan) -> list[Step]:
        e = self.context.encoder
        if plan.method in ("chosen", "rejected"):
            return [Step(tuple(e.response(getattr(row, plan.method))[:-1])) for row in self.rows]
        current = self[plan.of].ids if plan.of else [()] * len(self.rows)
        if plan.shuffled:
            current = [*current[1:], *current[:1]]
        key = common.key_of(self.context.config, f"evaluate/{self.split}/{plan.name}")
        draws = np.asarray([(i, self._iteration(plan)) for i in range(len(self.rows))], np.uint32)
        method = self._method(plan.method, plan.stage, self._temperature(plan))
        return method([row.prompt for row in self.rows], current, key, draws)
