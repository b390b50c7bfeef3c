"""The one training loop: every learner is a `train_step(state, batch) -> (state, metrics)`; PPO's is an iteration."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pit_jax import checkpoint, interrupts, metrics, train_state
from pit_jax.types import Metrics


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


@contextlib.contextmanager
def _traced(folder: Path, steps: range) -> Iterator[Callable[[int, Any], None]]:
    """Yields what is called with (step, state) before each step: a trace of `steps` is written."""
    runs = False

    def before(step: int, state: Any) -> None:
        nonlocal runs
        if runs and step == steps.stop:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            runs = False
        if not runs and step in steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder)
            runs = True

    try:
        yield before
    finally:
        if runs:
            jax.profiler.stop_trace()


def run(
    state: Any,
    *,
    stage: str,
    num_steps: int,
    batch_at: Callable[[int], Any],
    train_step: Callable[[Any, Any], tuple[Any, Metrics]],
    directory: Path,
    writer: metrics.MetricsWriter,
    save_every: int,
    evaluate: Callable[[Any, int], None] | None = None,
    eval_every: int = 0,
    profile: int = 0,
) -> Any:
    """Trains from the newest checkpoint in `directory` (or from `state`) to `num_steps`.

    Everything a step does is a function of (state, step), so a run that was killed at any point and started again gives
    bitwise the state of one that was not.

    Args:
      state: the state at step 0; also says the shapes and shardings of what is restored. It is donated.
      stage: name in metrics and messages.
      num_steps: steps in all.
      batch_at: step -> batch, a pure function.
      train_step: jitted, donates the state.
      directory: of this stage's checkpoints.
      writer: of metrics.
      save_every: steps between checkpoints; the last step is always saved.
      evaluate: called with (state, step) at step 0 and every `eval_every` steps, before the checkpoint of that step.
      eval_every: 0: only at step 0 and at the end.
      profile: steps of which a trace is written to profile/STAGE beside the metrics, after two that may compile;
        TensorBoard and XProf open it. 0: none.

    Returns:
      The state at `num_steps`.

    Raises:
      NonFiniteError: at the first step whose metrics are not finite; the checkpoint before it stays.
      Interrupted: after SIGTERM or Ctrl-C, when the step that ran is saved.
    """
    restored = checkpoint.restore_latest(directory, train_state.saved_part(state), donate=True)
    start = 0
    if restored is not None:
        start, state = restored[0], train_state.restored(restored[1], state)
        writer.truncate(stage, start + 1)  # the line of the checkpoint's step was written before it
    else:
        writer.truncate(stage, 0)
        if evaluate:
            evaluate(state, 0)

    pending: tuple[int, Metrics, float] | None = None  # with the seconds that the batch took
    clock = time.perf_counter()

    def flush():
        # Metrics of step n - 1 are fetched after step n was dispatched, so that the device does not wait for the host.
        nonlocal pending, clock
        if pending is None:
            return
        step, values, data_seconds = pending[0], metrics.reduce(pending[1]), pending[2]
        pending = None
        bad = metrics.nonfinite(values)
        if bad:
            saver.wait()
            last = checkpoint.latest_step(directory)
            kept = "nothing was saved yet" if last is None else f"the checkpoint of step {last} in {directory} is kept"
            raise NonFiniteError(
                f"stage {stage}: {', '.join(bad)} not finite at step {step}; {kept}. Lower the learning rate of this "
                "stage (in a new --workdir) or look at the rows of that step."
            )
        now = time.perf_counter()
        writer.write(stage, step, values | {"seconds": now - clock, "seconds/data": data_seconds})
        clock = now
        bar.update(1, values)

    first = max(min(start + 2, num_steps - profile), start)
    traced = _traced(writer.directory / "profile" / stage, range(first, first + profile))
    saver = checkpoint.Saver(directory, keep=2)
    bar = metrics.progress(num_steps, start, stage)
    with bar, interrupts.deferred() as asked, traced as trace, saver:
        for step in range(start, num_steps):
            trace(step, state)
            began = time.perf_counter()
            batch = batch_at(step)
            seconds = time.perf_counter() - began
            state, values = train_step(state, batch)
            flush()
            pending = (step + 1, values, seconds)
            last = step + 1 == num_steps
            evaluate_now = evaluate and (last or (eval_every and (step + 1) % eval_every == 0))
            number = asked()
            if evaluate_now or last or number or (step + 1) % save_every == 0:
                flush()
                if evaluate_now:
                    evaluate(state, step + 1)
                    clock = time.perf_counter()  # the seconds of a step are those of training
                writer.sync()
                saver.save(step + 1, train_state.saved_part(state))
            if number:
                saver.wait()
                raise interrupts.Interrupted(number, f"stage {stage}: step {step + 1} of {num_steps} is saved")
    return state
