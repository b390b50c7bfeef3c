"""Runs works with each library in turn, and makes the table: launch/peers.sh calls it, which has made the environments.

Each (work, round, library) is a process of its own and a JSON line. Only the standard library.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
OURS = "pit_jax"
PEERS = {
    "sft": ("transformers eager", "transformers compile", "trl", "trl compile", "tunix"),
    "dpo": ("trl", "trl stored", "trl stored+compile", "tunix"),
    "rm": ("trl", "trl compile", "tunix"),
    "ppo": ("trl", "tunix"),
    "gen": ("transformers dynamic", "transformers static", "transformers static+compile", "tunix"),
}
"""Beginning of a work's name -> libraries and variants; the scripts say what they are. TRL samples by `generate` of
transformers."""

LIBRARIES = ("transformers", "trl", "tunix")
WORKS = (
    "sft_small", "sft_tiny", "dpo_small", "rm_small", "ppo_tiny_e4", "gen_small_b16", "gen_small_b64", "gen_tiny_b16",
)  # fmt: skip
MORE = ("ppo_tiny_e1", "gen_tiny_b64")
"""Works that are measured where they are asked for."""

QUIET = 0.25
"""Cores that something else may take, in the median over calls; above that the table says so."""

APART = 1800
"""Seconds from the first to the last turn of a round; above that the table says so."""


def kind(work: str) -> str:
    """`sft` of `sft_small`."""
    return work.partition("_")[0]


# ------------------------------------------------------------------------------------------------------- what is to run


@dataclasses.dataclass(frozen=True)
class Task:
    """One process.

    Attributes:
      work: its name.
      round: from 1 on.
      peer: a library, and which variant of it behind a space.
    """

    work: str
    round: int
    peer: str

    @property
    def library(self) -> str:
        """The first word of `peer`."""
        return self.peer.partition(" ")[0]

    @property
    def variant(self) -> str:
        """The second word of `peer`, if it has two."""
        return self.peer.partition(" ")[2]


def tasks(works: Iterable[str], rounds: int) -> list[Task]:
    """In the order in which they run: of a work the others, then ours; each further round begins one later."""
    found = []
    for work in works:
        peers = (*PEERS[kind(work)], OURS)
        for number in range(1, rounds + 1):
            first = (number - 1) % len(peers)
            found += [Task(work, number, peer) for peer in peers[first:] + peers[:first]]
    return found


def settings_name(huge_pages: bool, avx512: bool) -> str:
    """As it stands in rows and in the table."""
    return " + ".join(["huge pages"] * huge_pages + ["AVX-512"] * avx512) or "stock"


def command(task: Task, args: argparse.Namespace, out: str) -> list[str]:
    """What a shell would run."""
    ours = task.library == OURS
    torch = task.library in ("transformers", "trl")
    # Of what is set outside only the other tunables stay.
    tunables = [part for part in os.environ.get("GLIBC_TUNABLES", "").split(":") if part and "hugetlb" not in part]
    variables = {
        "GLIBC_TUNABLES": ":".join(tunables + ["glibc.malloc.hugetlb=1"] * (not args.stock)),
        "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT) if ours else "",
    }  # fmt: skip
    if torch and args.avx512 and not args.stock:
        variables["LD_PRELOAD"] = args.avx512
    if task.library == "trl" and kind(task.work) == "ppo":
        variables |= {"PYTHONPATH": f"{args.folder}/trl-1.12", "TRL_EXPERIMENTAL_SILENCE": "1"}
    python = args.python if ours else f"{args.folder}/{'venv-torch' if torch else 'venv-jax'}/bin/python"
    return [
        "env", *(f"{name}={value}" for name, value in variables.items()), python,
        f"{FOLDER}/with_{task.library}.py", f"--works={args.folder}/works.jsonl", f"--work={task.work}",
        *([f"--variant={task.variant}"] if task.variant else []), f"--calls={args.calls}", f"--out={out}",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- a task


def last_error(text: str) -> str:
    """The last line that names an exception, else the last that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (named or lines or ["it printed nothing"])[-1][:300]


def run(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a command whose last argument is --out=FILE; what it wrote there, or `error`.

    Args:
      arguments: of the command.
      seconds: after which it is ended, with all that it has started.
    """
    out = Path(arguments[-1].partition("=")[2])
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        started = subprocess.Popen(
            arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = started.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"it had not ended after {seconds:g} seconds"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # also what it left behind, such as compilers
            started.wait()
        if status == 0 and out.exists():
            return json.loads(out.read_text("utf-8"))
        log.seek(0)
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        return {"error": f"{ended}: {last_error(log.read())}"}


# ------------------------------------------------------------------------------------------------------------- the rows


def read(path: Path) -> list[dict]:
    """Rows of a file; the end of a line that was being written when the machine stopped is cut off.

    Raises:
      ValueError: a line is no row.
    """
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            known = (row["task"]["work"], row["settings"], row["peer"], row["round"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} was not written by launch/peers.sh: name another file") from error
        rows.append(row | {"work": known[0]})
    return rows


def fitting(
    rows: Iterable[dict], works: dict[str, dict], settings: str, calls: int, processor: str, commit: str
) -> list[dict]:
    """Those that a run would give again.

    Args:
      rows: of a file.
      works: as they are now; a row of another one does not count.
      settings, calls, processor: of the run.
      commit: of this package (`version`): rows of ours are of the same, with no files that differ from it.
    """

    def fits(row: dict) -> bool:
        ours = row["peer"] == OURS
        return (
            row["settings"] == settings
            and works.get(row["work"]) == row["task"]
            and row.get("processor") == processor
            and ("error" in row or len(row["seconds"]) == calls)
            and not (ours and (row.get("commit") != commit or commit.endswith("+")))
        )

    return [row for row in rows if fits(row)]


def left(todo: Iterable[Task], rows: Iterable[dict]) -> list[Task]:
    """Tasks without a row; one that failed is run again."""
    had = {Task(row["work"], row["round"], row["peer"]) for row in rows if "error" not in row}
    return [task for task in todo if task not in had]


# ------------------------------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Line:
    """Of the table.

    Attributes:
      work, unit: its name, and what a second has some of.
      rates: peer -> units per second at the median call of all rounds.
      others: peer -> cores that were busy with something else, in the median; absent where that is not told.
      errors: peer -> why it has no rate.
    """

    work: str
    unit: str
    rates: dict[str, float]
    others: dict[str, float]
    errors: dict[str, str]

    @property
    def best(self) -> str | None:
        """The fastest that is not ours."""
        return max((peer for peer in self.rates if peer != OURS), key=self.rates.get, default=None)

    @property
    def ratio(self) -> float | None:
        """Ours over the best."""
        return self.rates[OURS] / self.rates[self.best] if OURS in self.rates and self.best else None


def summary(rows: Sequence[dict]) -> list[Line]:
    """A line per work, in the order of the rows."""
    found = []
    for work in dict.fromkeys(row["work"] for row in rows):
        of_work = [row for row in rows if row["work"] == work]
        rates, others, errors = {}, {}, {}
        for peer in dict.fromkeys((*PEERS[kind(work)], OURS)):
            of_peer = [row for row in of_work if row["peer"] == peer]
            if seconds := [second for row in of_peer for second in row.get("seconds", ())]:
                rates[peer] = of_work[0]["task"]["tokens"] / statistics.median(seconds)
                if cores := [n for row in of_peer for n in row.get("others", ()) if n is not None]:
                    others[peer] = statistics.median(cores)
            elif of_peer:
                errors[peer] = of_peer[-1]["error"]
        found.append(Line(work, of_work[0]["task"]["unit"], rates, others, errors))
    return found


def cell(line: Line, library: str) -> str:
    """All variants of a library."""
    found = []
    for peer in PEERS[kind(line.work)]:
        name, _, variant = peer.partition(" ")
        if name == library and peer in line.rates:
            found.append(f"{line.rates[peer]:,.0f} {variant}".strip())
        elif name == library and peer in line.errors:
            found.append(f"failed {variant}".strip())
    return ", ".join(found) or "-"


def table(rows: Sequence[dict], settings: str) -> str:
    """In Markdown: units per second, and below what failed, limits, and how busy the machine was."""
    head = ["work", "per second", "settings", *LIBRARIES, "best of them", OURS, "ratio"]
    out = [head, ["---"] * len(head)]
    lines = summary(rows)
    for line in lines:
        ours = f"{line.rates[OURS]:,.0f}" if OURS in line.rates else "failed" if OURS in line.errors else "-"
        best = f"{line.rates[line.best]:,.0f} {line.best}" if line.best else "-"
        ratio = f"{line.ratio:.2f}" if line.ratio else "-"
        cells = (cell(line, library) for library in LIBRARIES)
        out.append([line.work, line.unit, settings, *cells, best, ours, ratio])
    text = ["| " + " | ".join(row) + " |" for row in out]
    text += [f"{line.work}, {peer}: {error}" for line in lines for peer, error in line.errors.items()]
    text += [
        f"{line.work}, {peer}: something else took {cores:.2f} cores meanwhile, which makes it slower"
        for line in lines
        for peer, cores in line.others.items()
        if cores > QUIET
    ]
    return "\n".join([*text, *far_apart(rows), *conditions(rows)])


def far_apart(rows: Sequence[dict]) -> list[str]:
    """A line for each round of a work whose turns do not lie close together."""
    found = []
    for work, number in dict.fromkeys((row["work"], row["round"]) for row in rows):
        turns = [row for row in rows if (row["work"], row["round"]) == (work, number) and "time" in row]
        times = [time.mktime(time.strptime(row["time"], "%Y-%m-%dT%H:%M:%S")) for row in turns]
        if turns and max(times) - min(times) > APART:
            found.append(
                f"{work}, round {number}: its turns lie {(max(times) - min(times)) / 3600:.1f} hours apart: numbers of "
                "different hours compare badly"
            )
    return found


def conditions(rows: Sequence[dict]) -> list[str]:
    """Medians of the limits, and of the cores that others took."""
    found = []
    for name, libraries in (("torch", ("transformers", "trl")), ("jax", ("tunix", OURS))):
        limits = [row["limit_flops"] for row in rows if "error" not in row and row["peer"].split()[0] in libraries]
        if limits:
            found.append(f"{name} {statistics.median(limits) / 1e9:,.0f}")
    if not found:
        return []
    lines = [f"GFLOP/s of float32 products, in the median: {', '.join(found)}."]
    others = [n for row in rows for n in row.get("others", ()) if n is not None]
    if others:
        lines.append(f"Cores busy with something else, in the median: {statistics.median(others):.2f}.")
    return lines


# ---------------------------------------------------------------------------------------------------------- the command


def positive(text: str) -> int:
    """A number from 1 on."""
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def names(text: str) -> list[str]:
    """Works."""
    found = text.split(",")
    if wrong := [name for name in found if name not in WORKS + MORE]:
        raise argparse.ArgumentTypeError(f"no peer does {wrong[0]!r}: use some of {', '.join(WORKS + MORE)}")
    return list(dict.fromkeys(found))


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """See launch/peers.sh; the last four are given by it."""
    parser = argparse.ArgumentParser(
        prog="bash launch/peers.sh", usage="bash launch/peers.sh --help says what there is", allow_abbrev=False
    )
    parser.add_argument("--works", type=names, default=list(WORKS))
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--calls", type=positive, default=5)
    parser.add_argument("--seconds", type=positive, default=600)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--python")
    parser.add_argument("--avx512", default="")
    return parser.parse_args(argv)


def version() -> str:
    """The commit of ours, with a + where files differ from it; empty outside a git checkout."""
    said = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip()


def main() -> None:
    """Runs what is left, and prints the table."""
    args = arguments_of()
    if args.check:
        return
    todo = tasks(args.works, args.rounds)
    if args.dry_run:
        for task in todo:
            print("+ " + shlex.join(command(task, args, "ROW")))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.json:  # before anything is measured
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.open("a").close()
    settings = settings_name(not args.stock, bool(args.avx512) and not args.stock)
    described = map(json.loads, Path(args.folder, "works.jsonl").read_text("utf-8").splitlines())
    works = {row["work"]: row for row in described if row["work"] in args.works}
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform(), "commit": version()}
    had = read(args.json) if args.json else []
    rows = fitting(had, works, settings, args.calls, machine["processor"], machine["commit"])
    rest = left(todo, rows)
    if len(rest) < len(todo):
        print(f"{len(todo) - len(rest)} of {len(todo)} are in {args.json} already")
    for task in rest:
        print(f"{task.work} {task.round}/{args.rounds} {task.peer}: ", end="", flush=True)
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            found = run(command(task, args, f"{folder}/row"), args.seconds)
        row = {
            "settings": settings, "peer": task.peer, "round": task.round, "time": time.strftime("%FT%T"),
            "process_seconds": time.time() - started, **machine, **found, "task": works[task.work],
        }  # fmt: skip
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row | {"work": task.work})
        if "error" in row:
            print(row["error"], flush=True)
        else:
            seconds = statistics.median(row["seconds"])
            print(f"{works[task.work]['tokens'] / seconds:,.0f} per second, {seconds:.3f} s a call", flush=True)
    order = {task: place for place, task in enumerate(todo)}
    of_todo = [row for row in rows if Task(row["work"], row["round"], row["peer"]) in order]
    of_todo.sort(key=lambda row: order[Task(row["work"], row["round"], row["peer"])])
    print("", table(of_todo, settings), sep="\n")


def processor() -> str:
    """Its name, by Linux."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", path.read_text("utf-8"), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
