"""Improves your own answers with a trained workdir.

python -m pit_jax.improve --workdir=runs/demo --input=answers.jsonl --output=improved.jsonl --iterations=3
python -m pit_jax.improve --workdir=runs/demo --interactive

--input has a JSON object per line: {"prompt": ..., "response": ...} or {"messages": [...]}; where there is no response,
M_P writes one first. --output gets one line for each, in the same order: every answer with what it took and its gap by
R_PIT, which of them is the result, and why the row stopped.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from pit_jax import cli, files, processes, sharding
from pit_jax.evaluation import pit as evaluation
from pit_jax.pipelines import common, improve, improve_file, pit
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.improve import StopRules

STOPS = ("identical", "gap")

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a finished `python -m pit_jax.train`.")
_INPUT = flags.DEFINE_string("input", None, "JSON lines to improve (.gz and .xz too).")
_OUTPUT = flags.DEFINE_string("output", None, "JSON lines of what came of them.")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Ask for a prompt and an answer at a time.")
_METHOD = flags.DEFINE_enum(
    "method", None, list(improve.METHODS), "How an answer is improved; pit, or srt in its runs."
)
_ITERATIONS = flags.DEFINE_integer("iterations", 1, "K: at most so many new answers per row.")
_STOP = flags.DEFINE_list(
    "stop", [], "Stop earlier: identical (to the answer before), gap (a gain by R_PIT that is small)."
)
_MIN_GAIN = flags.DEFINE_float("min_gain", None, "Of --stop=gap; where not given, calibrated on the selection rows.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "Stop a row that has taken so many tokens; 0: never.")
_MAX_SECONDS = flags.DEFINE_float("max_seconds", 0.0, "Begin nothing after so long; 0: no limit.")
_KEEP = flags.DEFINE_enum("keep", "last", improve.KEEP, "The result: the last answer, or the best by R_PIT's gains.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.4, "Of all samples; 0: greedy.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of all samples.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Rows under way at a time.", lower_bound=1)


def settings_of_flags(context: Context, method: str) -> improve_file.Settings:
    """The flags as settings; the threshold of the gain is calibrated where it is asked for and not given.

    Raises:
      ValueError: where flags contradict one another.
    """
    stops = [stop for stop in _STOP.value if stop]
    for stop in stops:
        if stop not in STOPS:
            raise ValueError(f"--stop names {stop!r}: use {', '.join(STOPS)}")
    if _MIN_GAIN.value is not None and "gap" not in stops:
        raise ValueError("--min_gain is for --stop=gap: add it, or leave --min_gain out")
    if method == "srt" and ("gap" in stops or _KEEP.value == "best"):
        raise ValueError("--stop=gap and --keep=best need R_PIT, which a run of SRT has not")
    min_gain = _MIN_GAIN.value
    if "gap" in stops and min_gain is None:
        min_gain = calibrated(context, method)
    rules = StopRules(
        identical="identical" in stops,
        min_gain=min_gain,
        max_tokens=_MAX_TOKENS.value,
        max_seconds=_MAX_SECONDS.value,
        iterations=_ITERATIONS.value,
        keep=_KEEP.value,
    )
    return improve_file.Settings(method, rules, _TEMPERATURE.value, _SEED.value)


def calibrated(context: Context, method: str) -> float:
    """The threshold of the gain from the selection rows; their answers are made once and kept in the workdir."""
    if method == "rerank":
        raise ValueError("--stop=gap with --method=rerank needs --min_gain: its answers never become worse by R_P")
    needed = [pit.gap_stage(context.config), "rl_policy", "evaluator"]
    lacking = [stage for stage in needed if context.workdir.done(stage) is None]
    if lacking:
        raise ValueError(f"--stop=gap without --min_gain needs the stages {', '.join(lacking)}: finish the training")
    print("calibrating --min_gain on the selection rows", file=sys.stderr)
    common.load_data(context, ("selection", "test"))
    options = evaluation.Options(num_iterations=_ITERATIONS.value)
    run = evaluation.Evaluation(evaluation.SYSTEM, context, options)
    threshold = evaluation.calibrated_threshold(run, method, _TEMPERATURE.value)
    print(f"--min_gain={threshold:.4f}", file=sys.stderr)
    return threshold


def main(argv: list[str]) -> None:
    """A user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    goes_on = "" if _INTERACTIVE.value else f"the same command goes on from {_OUTPUT.value}.partial"
    with cli.one_line_errors(goes_on):
        if _INTERACTIVE.value == bool(_INPUT.value or _OUTPUT.value) or bool(_INPUT.value) != bool(_OUTPUT.value):
            raise ValueError("name --input=FILE and --output=FILE, or --interactive")
        processes.start()
        workdir = files.place(_WORKDIR.value)
        cli.keep_programs(workdir)
        if _INTERACTIVE.value and processes.are_several():
            raise ValueError("--interactive is for one process: use --input and --output")
        context, method = improve.open_finished(workdir, _METHOD.value or "")
        with jax.set_mesh(sharding.make_mesh(context.config.mesh.data, context.config.mesh.model)):
            size = 1 if _INTERACTIVE.value else _BATCH_SIZE.value
            improver = improve_file.Improver(context, settings_of_flags(context, method), size)
            context.workdir.push()  # answers by which a threshold was calibrated
            if _INTERACTIVE.value:
                improve_file.interactive(improver)
            else:
                lines = improve_file.run(improver, Path(_INPUT.value), Path(_OUTPUT.value))
                print(improve_file.summary(lines))


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
