"""What the commands share: where compiled programs are kept, and how a user's mistake ends."""

import contextlib
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from pit_jax import files, interrupts, processes
from pit_jax.data.sources import DataError
from pit_jax.learners.loop import NonFiniteError

MISTAKES = (DataError, NonFiniteError, ValueError, ImportError, OSError)
"""What a user can mend: a wrong value, a broken file, a missing extra."""


def keep_programs(workdir: Path) -> None:
    """Compiled programs stay in the workdir, or where JAX_COMPILATION_CACHE_DIR says."""
    folder = workdir if files.is_remote(workdir) else workdir.absolute()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    # By default JAX keeps the choices of GPU compilers apart too, in a folder whose path is part of every program's
    # name: whoever moved a workdir would compile all again. What is compiled has these choices in it.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # A bucket takes longer to give a small program than the compiler to make it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5 if files.is_remote(workdir) else 0.05)


@contextlib.contextmanager
def one_line_errors(stopped: str = "") -> Iterator[None]:
    """A mistake ends in one line on stderr and status 2 (--v=1 shows where it was raised).

    Ctrl-C ends in status 130, SIGTERM in that of `interrupts`, on which a launcher starts the command again.

    Args:
      stopped: printed at Ctrl-C: how to go on.
    """
    try:
        with interrupts.raised() if stopped else contextlib.nullcontext():
            yield
    except MISTAKES as error:
        if flags.FLAGS["v"].value > 0:
            raise
        which = "" if processes.is_first() else f" in process {jax.process_index()}"
        print(f"error{which}: {error}", file=sys.stderr)
        processes.leave(2)
    except jax.errors.JaxRuntimeError as error:
        if not processes.are_several():
            raise
        reason = str(error).strip().partition("\n")[0]
        print(
            f"error in process {jax.process_index()}: {reason}\nIf another process has ended, look at what it printed. "
            f"{stopped[:1].upper()}{stopped[1:]}",
            file=sys.stderr,
        )
        processes.leave(2)
    except interrupts.Interrupted as error:
        print(f"{error}{stopped and '; '}{stopped}", file=sys.stderr)
        sys.exit(interrupts.RESTART if error.number == signal.SIGTERM else 130)
    except interrupts.Terminated:
        print(f"\nSIGTERM; {stopped}", file=sys.stderr)
        sys.exit(interrupts.RESTART)
    except KeyboardInterrupt:
        print(f"\nstopped{stopped and '; '}{stopped}", file=sys.stderr)
        sys.exit(130)
    except Exception:  # a fault of ours
        if not processes.are_several():
            raise
        traceback.print_exc()
        processes.leave(1)  # the usual way out waits for the others, half a minute, and ends them without a word


def parse_flags(argv: list[str]) -> list[str]:
    """A misspelt flag, field or variant of a config ends in one line too, not in a traceback from inside a library."""
    for argument in argv[1:]:
        name, _, value = argument.partition("=")
        path = Path(value.partition(":")[0])
        if name in ("--config", "-config") and value and not path.is_file():
            known = sorted(str(found) for found in path.parent.glob("*.py")) if path.parent.is_dir() else []
            near = difflib.get_close_matches(str(path), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": use one of {', '.join(known)}" if known else ""
            print(f"error: there is no config file {path}{hint}", file=sys.stderr)
            sys.exit(2)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A config file that raises is reported with its traceback: the last line says what is wrong.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[-1].split(": ", 1)[-1] if "Traceback" in str(error) else " ".join(lines)
    except (AttributeError, KeyError) as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).name != "config_dict.py":
            raise  # a fault in the config file, which is read here as well
        given = re.findall(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE)
        message = unknown_field(flags.FLAGS["config"].parser.parse(given[-1]).to_dict(), argv) or str(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def unknown_field(config: Mapping, argv: Sequence[str]) -> str | None:
    """What to say of the first --config.FIELD among `argv` that a config has not, with the most alike of its fields."""
    for argument in argv:
        found = re.fullmatch(r"--?(?:no)?config\.([^=]+)(=.*)?", argument, re.DOTALL)
        here: Any = config
        for part in found[1].split(".") if found else ():
            if not isinstance(here, Mapping) or part not in here:
                near = difflib.get_close_matches(found[1], _fields(config), n=1, cutoff=0.5)
                return f"the config has no field '{found[1]}'" + (f". Did you mean '{near[0]}'?" if near else "")
            here = here[part]
    return None


def _fields(config: Mapping, before: str = "") -> list[str]:
    """ "ppo", "ppo.kl_coef", ... of a config."""
    found = []
    for name in config:
        found.append(before + name)
        if isinstance(config[name], Mapping):
            found += _fields(config[name], f"{before}{name}.")
    return found
