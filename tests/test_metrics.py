import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from pit_jax import metrics


def _lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _write(writer, stage, steps, value=1.0):
    for step in steps:
        writer.write(stage, step, {"loss": value})


# reduce, nonfinite


def test_reduce_divides_once_and_returns_floats():
    result = metrics.reduce({"loss": (jnp.float32(3.0), jnp.float32(2.0)), "n": (5, 4), "a": (np.float64(1), True)})
    assert result == {"loss": 1.5, "n": 1.25, "a": 1.0}
    assert all(type(x) is float for x in result.values())


def test_reduce_of_nothing_is_zero_but_a_nan_sum_stays():
    assert metrics.reduce({"empty": (jnp.float32(0.0), jnp.float32(0.0))}) == {"empty": 0.0}
    assert math.isnan(metrics.reduce({"lost": (jnp.float32(jnp.nan), jnp.float32(0.0))})["lost"])


def test_reduce_refuses_a_metric_per_row():
    with pytest.raises(ValueError, match="'loss' is not a pair of scalars"):
        metrics.reduce({"loss": (jnp.ones(3), jnp.ones(3))})


def test_nonfinite_names_in_order():
    values = {"loss": math.nan, "kl": 0.0, "grad_norm": math.inf, "score": -math.inf}
    assert metrics.nonfinite(values) == ["loss", "grad_norm", "score"]
    assert metrics.nonfinite({"loss": 1e308}) == []


# MetricsWriter


def test_lines_have_stage_step_time_and_values(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write("sft_policy", 3, {"loss": 1.5, "kl": math.nan, "x": -math.inf})
        # Nothing is buffered: the line is there before the writer is closed.
        (line,) = _lines(tmp_path)
    assert line.pop("time") > 1.7e9
    assert line == {"stage": "sft_policy", "step": 3, "loss": 1.5, "kl": None, "x": None}
    assert list((tmp_path / "tensorboard" / "sft_policy").glob("events.*"))


def test_tensorboard_holds_the_finite_values(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write("sft", 3, {"loss": 1.5, "kl": math.nan})
        writer.write("sft", 4, {"loss": 1.25})
    assert _events(tmp_path / "tensorboard" / "sft")[1] == [("loss", 3, 1.5), ("loss", 4, 1.25)]


def test_tensorboard_hides_the_steps_that_are_written_again(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        _write(writer, "sft", [1, 2, 3])
        writer.truncate("sft", 2)
        _write(writer, "sft", [2])
    starts, _ = _events(tmp_path / "tensorboard" / "sft")
    assert starts == [2]


def _events(directory):
    """(steps of session starts, (name, step, value)s) of all event files, in the order of their names."""
    starts, scalars = [], []
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            if event.HasField("session_log"):
                starts.append(event.step)
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return starts, scalars


def test_a_resumed_run_has_each_step_once(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        _write(writer, "sft", range(1, 6))
        _write(writer, "rm", range(1, 7))
    with metrics.MetricsWriter(tmp_path) as writer:  # the checkpoint of step 3 was restored
        writer.truncate("sft", 4)
        _write(writer, "sft", range(4, 8), value=2.0)
    lines = _lines(tmp_path)
    assert [x["step"] for x in lines if x["stage"] == "sft"] == [1, 2, 3, 4, 5, 6, 7]
    assert [x["loss"] for x in lines if x["stage"] == "sft"] == [1.0] * 3 + [2.0] * 4
    assert [x["step"] for x in lines if x["stage"] == "rm"] == [1, 2, 3, 4, 5, 6]


def test_truncate_works_while_the_file_is_open(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        _write(writer, "sft", [1, 2, 3])
        writer.truncate("sft", 2)
        _write(writer, "sft", [2])
    assert [x["step"] for x in _lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("rest", [b'{"stage": "sft", "step": 3, "lo', b'{"stage": "sft", "step": 3}', b"\xe2\x82"])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, rest):
    with metrics.MetricsWriter(tmp_path) as writer:
        _write(writer, "sft", [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(rest)
    with metrics.MetricsWriter(tmp_path) as writer:
        _write(writer, "sft", [3])
    assert [x["step"] for x in _lines(tmp_path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        _write(writer, "sft", [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + "\0\0\0\n" + second)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2 is not a metrics line"):
        metrics.MetricsWriter(tmp_path).close()
    assert path.read_text() == first + second


def test_names_of_the_lines_own_keys_are_refused(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="'step'"):
        writer.write("sft", 1, {"step": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


# progress


def test_plain_lines_come_at_most_once_per_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with metrics.progress(100, 40, "sft", file=file, interval=10.0) as bar:
        for _ in range(60):
            now[0] += 0.5
            bar.update(1, {"loss": 2.5, "unknown": 1.0})
    lines = file.getvalue().splitlines()
    assert len(lines) == 3 + 1  # at 10, 20 and 30 seconds, and at the end
    assert lines[0] == "sft: 60/100 (60%), 2.00 steps/s, 00:20 left, loss=2.5"
    assert lines[-1] == "sft: 100/100 (100%), 2.00 steps/s, in 00:30, loss=2.5"


def test_time_left_follows_the_latest_rate_not_the_compilation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with metrics.progress(1000, 0, "rl", file=file, interval=10.0) as bar:
        now[0] = 60.0  # the first step compiles
        bar.update()
        for _ in range(20):
            now[0] += 0.5
            bar.update()
    lines = file.getvalue().splitlines()
    assert "60.00 s/step" in lines[0]
    assert lines[1].startswith("rl: 21/1000 (2%), 2.00 steps/s, 08:09 left")


def test_nothing_is_shown_where_all_is_done_and_no_end_after_an_error():
    file = io.StringIO()
    with metrics.progress(5, 5, "sft", file=file):
        pass
    with pytest.raises(KeyError), metrics.progress(5, 0, "sft", file=file) as bar:
        bar.update()
        raise KeyError
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    with metrics.progress(3, 1, "sft", file=file) as bar:
        for _ in range(2):
            bar.update(1, {"loss": 0.125})
    last = file.getvalue().split("\r")[-1]
    assert "sft: 100%" in last
    assert "3/3" in last
    assert "loss=0.125" in last
    assert "step/s" in last or "s/step" in last
