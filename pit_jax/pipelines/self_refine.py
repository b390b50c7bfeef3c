"""Self-Refine prompting (Madaan et al. 2023), PIT's baseline, in the two-call form of appendix E.1.

M_P^RL is asked for an analysis of its answer, then for a better answer: Algorithm 2 with another improver.
"""

from collections.abc import Sequence

from pit_jax.config import SamplingConfig
from pit_jax.pipelines import pit
from pit_jax.types import PreferenceExample


def refine(
    context: pit.Context,
    rows: Sequence[PreferenceExample],
    responses: Sequence[Sequence[int]],
    *,
    stage: str = "rl_policy",
    name: str = "self_refine",
) -> tuple[list[list[int]], dict[str, float]]:
    """One Self-Refine iteration.

    An analysis that is empty or did not end within its window does not parse: the answer is then left as it is, and
    counted.

    Args:
      context: of the run.
      rows: prompts.
      responses: the answers to improve, as ids without EOS.
      stage: whose model reflects and refines.
      name: of the PRNG keys.

    Returns:
      (improved answers as ids without EOS, {"parse_rate": share of analyses that parse}).
    """
    config, e = context.config, context.encoder
    model, params = pit.model_of(context, stage), pit.load_model(context, stage)
    eos, size = e.tokenizer.eos_id, config.evaluation.batch_size
    temperature = config.evaluation.temperature

    prompts = [e.reflection_prompt(r.prompt, y) for r, y in zip(rows, responses, strict=True)]
    analyses = pit.sample(
        model, params, prompts, pit.key_of(config, f"{name}/reflect"), window=e.reflection_prompt_window,
        settings=SamplingConfig(config.data.reflection_window, temperature), eos_id=eos, batch_size=size,
    )  # fmt: skip
    parsed = [0 < len(a) < config.data.reflection_window for a in analyses]
    prompts = [e.refinement_prompt(r.prompt, y, a) for r, y, a in zip(rows, responses, analyses, strict=True)]
    refined = pit.sample(
        model, params, prompts, pit.key_of(config, f"{name}/refine"), window=e.refinement_prompt_window,
        settings=SamplingConfig(config.data.response_window, temperature), eos_id=eos, batch_size=size,
    )  # fmt: skip
    improved = [new if ok else list(old) for new, old, ok in zip(refined, responses, parsed, strict=True)]
    return improved, {"parse_rate": sum(parsed) / len(parsed)}
