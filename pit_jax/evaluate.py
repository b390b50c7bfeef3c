"""Judges what a finished run writes: python -m pit_jax.evaluate --workdir=runs/demo --tables=all

or a file of answers to a benchmark: python -m pit_jax.evaluate --benchmark=gsm8k --input=answers.jsonl

Writes results.json, tables.txt, tables/*.csv and report/ into the workdir. Answers and verdicts are kept below
evaluation/, so a second start, or one that asks for more, makes only what is missing.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from pit_jax import cli, client, files, processes, sharding
from pit_jax.config import PitConfig, SrtConfig
from pit_jax.evaluation import benchmark_files, judges, llm_judge, pit, run, srt
from pit_jax.evaluation.run import MoreJudges, Options, System
from pit_jax.files import read_json
from pit_jax.pipelines import common
from pit_jax.pipelines.common import Context

SYSTEMS = {PitConfig: pit.SYSTEM, SrtConfig: srt.SYSTEM}


def _names(field: str) -> str:
    """Of tables or judges, for the help."""
    return "; SRT ".join(", ".join(getattr(system, field)) for system in SYSTEMS.values())


_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a finished `python -m pit_jax.train`.")
_TABLES = flags.DEFINE_list("tables", ["all"], f"all, or some of: PIT {_names('tables')}.")
_JUDGES = flags.DEFINE_list("judges", [], f"The run's own: PIT {_names('judges')}; none: the usual ones.")
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
_LLM_COMPARISONS = flags.DEFINE_list("llm_comparisons", [], "What it is asked about; none: the main ones.")
_BENCHMARK = flags.DEFINE_enum("benchmark", None, list(benchmark_files.BENCHMARKS), "Score --input, and nothing else.")
_INPUT = flags.DEFINE_string("input", None, "Of --benchmark: JSON lines, or the annotations of AlpacaEval.")
_DIFFICULTY = flags.DEFINE_string("difficulty", None, "Of --benchmark=alpaca_eval: instructions with their difficulty.")
_SHEET = flags.DEFINE_string("sheet", None, "Write a blind sheet for annotators of this comparison.")
_SHEET_SIZE = flags.DEFINE_integer("sheet_size", 170, "Prompts of the sheet.", lower_bound=1)
_VERDICTS = flags.DEFINE_list("verdicts", [], "Files that annotators have saved; they are kept in the workdir.")


def options_of_flags(system: System) -> Options:
    """The flags as options.

    Raises:
      ValueError: where a value is not one of the known ones.
    """
    try:
        temperatures = tuple(float(t) for t in _TEMPERATURES.value)
    except ValueError:
        raise ValueError(f"--temperatures={','.join(_TEMPERATURES.value)}: numbers with commas between them") from None
    names = tuple(_TABLES.value)
    return Options(
        tables=tuple(system.tables) if names == ("all",) else names,
        judges=tuple(_JUDGES.value) or system.usual_judges,
        num_iterations=_ITERATIONS.value,
        temperatures=temperatures,
        num_shuffles=_SHUFFLES.value,
    )


def judges_of_flags(system: System, context: Context) -> MoreJudges:
    """Judges that are not the run's own.

    Raises:
      ValueError: where they cannot be asked, before anything is generated.
    """
    if _SHEET.value and _SHEET.value not in system.comparisons:
        raise ValueError(f"--sheet={_SHEET.value} is not a comparison: use {', '.join(system.comparisons)}")
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
        comparisons = tuple(_LLM_COMPARISONS.value) or (*system.main_comparisons, "chosen_vs_rejected")
        known = [*system.comparisons, "chosen_vs_rejected"]
        for name in comparisons:
            if name not in known:
                raise ValueError(f"--llm_comparisons names {name!r}: use {', '.join(known)}")
        makers.append(
            lambda m: judges.language_model_judge(
                config, template, m.root / "verdicts" / m.split, m.rows, _LLM_PROMPTS.value, comparisons
            )
        )
    people = judges.human_judge(run.human_folder(context.workdir.root))
    return lambda maker: [make(maker) for make in makers] + ([people] if people else [])


def train_command(workdir: Path) -> str:
    """What the run was trained by, as its last evaluation knew it."""
    path = workdir / "results.json"
    known = read_json(path).get("commands", {}).get("train") if path.is_file() else None
    return known or f"python -m pit_jax.train --config=... --workdir={workdir}"


def score_benchmark() -> None:
    """Prints the scores of a file."""
    with cli.one_line_errors():
        if not _BENCHMARK.value or not _INPUT.value:
            raise ValueError("name --workdir=FOLDER, or --benchmark=NAME and --input=FILE")
        print(json.dumps(benchmark_files.score(_BENCHMARK.value, _INPUT.value, _DIFFICULTY.value), indent=2))


def main(argv: list[str]) -> None:
    """A user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if _BENCHMARK.value or not _WORKDIR.value:
        return score_benchmark()
    with cli.one_line_errors("the same command goes on with what is in evaluation/"):
        processes.start()
        workdir = files.place(_WORKDIR.value)
        cli.keep_programs(workdir)
        context = common.open_workdir(workdir, train_command(workdir), writes=True)
        system = SYSTEMS[type(context.config)]
        options = options_of_flags(system)
        options.check(system)
        if _SHEET.value and "win_rates" not in options.tables:  # which has the answers of the sheets
            options = dataclasses.replace(options, tables=("win_rates", *options.tables))
        common.require(context, system.needs(context.config))
        with jax.set_mesh(sharding.make_mesh(context.config.mesh.data, context.config.mesh.model)):
            common.load_data(context, ("rm", "selection", "test"))
            run.add_verdicts(context.workdir.root, _VERDICTS.value)
            evaluation = run.Evaluation(system, context, options, judges_of_flags(system, context))
            with context.workdir.pushed_now_and_then():
                run.write(evaluation, " ".join(["python -m pit_jax.evaluate", *sys.argv[1:]]))
            if _SHEET.value:
                print(f"A sheet for annotators: {run.write_sheet(evaluation, _SHEET.value, _SHEET_SIZE.value)}")
        context.workdir.push()
        print((context.workdir.root / "tables.txt").read_text(encoding="utf-8"))
    print(f"Everything is in {workdir}: report/index.html, results.json, tables/, evaluation/, samples/test.jsonl.")


def start() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    start()
