"""Judges what a finished run writes: python -m pit_jax.evaluate --workdir=runs/demo --tables=all

or a file of answers to a benchmark: python -m pit_jax.evaluate --benchmark=gsm8k --input=answers.jsonl

Writes results.json, tables.txt, tables/*.csv and report/ into the workdir. Answers and verdicts are kept below
evaluation/, so a second start, or one that asks for more, makes only what is missing.
"""

import json
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from pit_jax import client, sharding
from pit_jax.data.sources import DataError
from pit_jax.evaluation import benchmark_files, judges, llm_judge, pit as evaluation
from pit_jax.pipelines import pit

COMPARISONS = ["original_vs_chosen", "pit_vs_original", "self_refine_vs_original", "pit_vs_self_refine"]
"""Those of Table 1; Table 4 asks about the labelled pairs."""

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a finished `python -m pit_jax.train`.")
_TABLES = flags.DEFINE_list("tables", ["all"], f"all, or some of {', '.join(evaluation.TABLES)}.")
_JUDGES = flags.DEFINE_list("judges", ["verifier", "evaluator"], f"Of {', '.join(evaluation.OWN_JUDGES)}.")
_ITERATIONS = flags.DEFINE_integer("iterations", 5, "K: iterations of each method.")
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "0.2", "0.4", "0.6", "0.8", "1"], "Of the temperature sweep.")
_SHUFFLES = flags.DEFINE_integer("shuffles", 100, "Orders of the comparisons for Elo.")
_REWARD_MODEL = flags.DEFINE_string("reward_model", None, "Judge: a Hugging Face reward model, a folder or a name.")
_REWARD_MODEL_LENGTH = flags.DEFINE_integer("reward_model_length", None, "Tokens that it reads at most.")
_LLM_MODEL = flags.DEFINE_string("llm_model", None, "Judge: a language model of an OpenAI-compatible server.")
_LLM_BASE_URL = flags.DEFINE_string("llm_base_url", "https://api.openai.com/v1", "Address of the server.")
_LLM_KEY_ENV = flags.DEFINE_string("llm_key_env", "OPENAI_API_KEY", "Environment variable with the key.")
_LLM_PROMPT = flags.DEFINE_string("llm_prompt", None, "helpful, summary, instructions, or a file of your own (.txt).")
_LLM_PROMPTS = flags.DEFINE_integer("llm_prompts", 128, "How many test prompts it is asked about.", lower_bound=1)
_LLM_IN_FLIGHT = flags.DEFINE_integer("llm_in_flight", 32, "Requests at a time.", lower_bound=1)
_LLM_MAX_TOKENS = flags.DEFINE_integer(
    "llm_max_tokens", 1024, "Longest reply; 0 leaves it to the server.", lower_bound=0
)
_LLM_TEMPERATURE = flags.DEFINE_float("llm_temperature", 0.0, "Of its replies; below 0 leaves it to the server.")
_LLM_EXTRA = flags.DEFINE_string("llm_extra", "", "A JSON object of further request fields.")
_LLM_COMPARISONS = flags.DEFINE_list("llm_comparisons", [*COMPARISONS, "chosen_vs_rejected"], "What it is asked about.")
_BENCHMARK = flags.DEFINE_enum("benchmark", None, list(benchmark_files.BENCHMARKS), "Score --input, and nothing else.")
_INPUT = flags.DEFINE_string("input", None, "Of --benchmark: JSON lines, or the annotations of AlpacaEval.")
_DIFFICULTY = flags.DEFINE_string("difficulty", None, "Of --benchmark=alpaca_eval: instructions with their difficulty.")
_SHEET = flags.DEFINE_string("sheet", None, "Write a blind sheet for annotators of this comparison.")
_SHEET_SIZE = flags.DEFINE_integer("sheet_size", 170, "Prompts of the sheet.", lower_bound=1)
_VERDICTS = flags.DEFINE_list("verdicts", [], "Files that annotators have saved; they are kept in the workdir.")


def options_of_flags() -> evaluation.Options:
    """The flags as options.

    Raises:
      ValueError: where a value is not one of the known ones.
    """
    try:
        temperatures = tuple(float(t) for t in _TEMPERATURES.value)
    except ValueError:
        raise ValueError(f"--temperatures={','.join(_TEMPERATURES.value)}: numbers with commas between them") from None
    names = tuple(_TABLES.value)
    return evaluation.Options(
        tables=evaluation.TABLES if names == ("all",) else names,
        judges=tuple(_JUDGES.value),
        num_iterations=_ITERATIONS.value,
        temperatures=temperatures,
        num_shuffles=_SHUFFLES.value,
    )


def judges_of_flags(context: pit.Context) -> evaluation.MoreJudges:
    """Judges that are not the run's own.

    Raises:
      ValueError: where they cannot be asked, before anything is generated.
    """
    if _SHEET.value and _SHEET.value not in evaluation.COMPARISONS:
        raise ValueError(f"--sheet={_SHEET.value} is not a comparison: use {', '.join(evaluation.COMPARISONS)}")
    makers = []
    if _REWARD_MODEL.value:
        make_hf = judges.hf_judge(_REWARD_MODEL.value, _REWARD_MODEL_LENGTH.value)
        makers.append(lambda m: make_hf(m.root / "scores" / m.split, m.rows))
    if _LLM_MODEL.value:
        synthetic = context.config.data.source == "synthetic"
        template = llm_judge.load_template(_LLM_PROMPT.value or ("instructions" if synthetic else "helpful"))
        config = client.ClientConfig(
            base_url=_LLM_BASE_URL.value,
            model=_LLM_MODEL.value,
            max_tokens=_LLM_MAX_TOKENS.value or None,
            temperature=_LLM_TEMPERATURE.value if _LLM_TEMPERATURE.value >= 0 else None,
            extra=_LLM_EXTRA.value,
            max_in_flight=_LLM_IN_FLIGHT.value,
            cache=str(context.workdir.root / "evaluation" / "calls"),
            api_key_env=_LLM_KEY_ENV.value,
        )
        comparisons = tuple(_LLM_COMPARISONS.value)
        known = [*evaluation.COMPARISONS, "chosen_vs_rejected"]
        for name in comparisons:
            if name not in known:
                raise ValueError(f"--llm_comparisons names {name!r}: use {', '.join(known)}")
        makers.append(
            lambda m: judges.language_model_judge(
                config, template, m.root / "verdicts" / m.split, m.rows, _LLM_PROMPTS.value, comparisons
            )
        )
    people = judges.human_judge(evaluation.human_folder(context.workdir.root))
    return lambda maker: [make(maker) for make in makers] + ([people] if people else [])


def score_benchmark() -> None:
    """Prints the scores of a file."""
    try:
        if not _BENCHMARK.value or not _INPUT.value:
            raise ValueError("name --workdir=FOLDER, or --benchmark=NAME and --input=FILE")
        print(json.dumps(benchmark_files.score(_BENCHMARK.value, _INPUT.value, _DIFFICULTY.value), indent=2))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str]) -> None:
    """A user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if _BENCHMARK.value or not _WORKDIR.value:
        return score_benchmark()
    workdir = Path(_WORKDIR.value)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(workdir.absolute() / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        options = options_of_flags()
        command = f"python -m pit_jax.train --config=... --workdir={workdir}"
        context = pit.open_finished(workdir, ["rl_policy", "final", "evaluator"], command)
        with jax.set_mesh(sharding.make_mesh(context.config.mesh.data, context.config.mesh.model)):
            pit.load_data(context, ("selection", "test"))
            evaluation.add_verdicts(workdir, _VERDICTS.value)
            run = evaluation.Evaluation(context, options, judges_of_flags(context))
            evaluation.write(run, " ".join(["python -m pit_jax.evaluate", *sys.argv[1:]]))
            if _SHEET.value:
                print(f"A sheet for annotators: {evaluation.write_sheet(run, _SHEET.value, _SHEET_SIZE.value)}")
    except (DataError, ValueError, ImportError, OSError) as error:
        if flags.FLAGS["v"].value > 0:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is in evaluation/", file=sys.stderr)
        sys.exit(130)
    print((workdir / "tables.txt").read_text(encoding="utf-8"))
    print(f"Everything is in {workdir}: report/index.html, results.json, tables/, evaluation/, samples/test.jsonl.")


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    app.run(main)


if __name__ == "__main__":
    run()
