"""The launchers: what --dry-run prints, and what they call where gcloud, srun, xpk and Python are scripts that write it
down. No test needs a cloud, a cluster or an installation."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECRETS = {"OPENAI_API_KEY": "sk-not-to-be-seen", "HF_TOKEN": "hf-not-to-be-seen", "PIT_PASSWORD": "pit-not-to-be-seen"}
SLICE = {"NAME": "pit", "ZONE": "us-central2-b", "TYPE": "v4-64"}
SHARE = {"SHARE": "10.0.0.2:/pit"}
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
STATE = [*QUEUED, "list", "--zone=us-central2-b", '--filter=name~"(^|/)pit$"', "--format=value(state.state)"]
CREATE = [
    *(*QUEUED, "create", "pit", "--zone=us-central2-b", "--node-id=pit", "--accelerator-type=v4-64"),
    "--runtime-version=tpu-ubuntu2204-base",
]
DELETE = [*QUEUED, "delete", "pit", "--zone=us-central2-b", "--force", "--quiet"]
TRAIN = ["--config=configs/pit_llama2.py:7b", "--workdir=/mnt/pit/runs/7b"]
BUCKET = ["--config=configs/pit_llama2.py:7b", "--workdir=gs://b/runs/7b"]
AWKWARD = [
    "--config=configs/pit_llama2.py:7b",
    "--workdir=/mnt/pit/my run",
    """--config.data.path=/a "b"/it's/$HOME/$(id)/`id`""",
    "--config.name=a;b|c&d>e*?~#!{x,y}\\",
    "--config.note=",
    "",
]

# Writes its name and arguments down, then does what the test says: `next FILE` takes a line of FILE (the last one again
# and again), prints it, and ends with the status behind "exit".
FAKE = r"""#!/usr/bin/env bash
printf -v call '%s\x1f' "${0##*/}" "$@"
printf '%s\x1e' "$call" >>"$FAKES/calls" # at once: several may be running
next() {
  local line
  line="$(head -n 1 "$FAKES/$1")"
  [ "$(wc -l <"$FAKES/$1")" -le 1 ] || sed -i 1d "$FAKES/$1"
  case "$line" in
    "exit "*) exit "${line#exit }" ;;
    *) printf '%b' "$line" ;;
  esac
}
"""


class Fakes:
    """A folder of scripts that stand for programs.

    Attributes:
      folder: goes first on PATH.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def add(self, name: str, does: str = "", path: Path | None = None, **lines: list[str]) -> None:
        """A program; `lines` are the files that `next` reads."""
        path = path or self.folder / name
        path.write_text(FAKE + does + "\n")
        path.chmod(0o755)
        for file, content in lines.items():
            (self.folder / file).write_text("".join(line + "\n" for line in content))

    def calls(self) -> list[list[str]]:
        """Every call so far."""
        if not (self.folder / "calls").exists():
            return []
        text = (self.folder / "calls").read_text()
        assert not [name for name, secret in SECRETS.items() if secret in text]
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "fakes")


@pytest.fixture
def checkout(tmp_path, fakes):
    """A copy of launch/ with a Python that trains nothing."""
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "configs").mkdir()
    (root / "configs/pit_llama2.py").touch()
    (root / ".venv/bin").mkdir(parents=True)
    add_python(fakes, root, "exit 0")
    return root


def add_python(fakes, root, does, **lines):
    """`does` is what training does."""
    script = 'case "$1 $2" in "-c "*) exit 0 ;; "- "*) cat >/dev/null; echo key; exit 0 ;; "-m pip") exit 0 ;; esac\n'
    environment = 'echo "$(env | grep ^PIT_JAX_ | sort | tr "\\n" " ")" >>"$FAKES/found"\n'
    fakes.add("python", script + environment + does, path=root / ".venv/bin/python", **lines)


def environment(fakes=None, **more):
    """Of a launcher: nothing of this process but PATH, and keys that nobody may see."""
    path = os.environ["PATH"] if fakes is None else f"{fakes.folder}:{os.environ['PATH']}"
    found = {"PATH": path, "HOME": "/nowhere", "POLL": "0.05", **SECRETS, **more}
    return found if fakes is None else found | {"FAKES": str(fakes.folder)}


def launch(script, *arguments, fakes=None, root=ROOT, **more):
    """Runs a launcher."""
    command = ["bash", str(root / "launch" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(fakes, **more))
    assert not [name for name, secret in SECRETS.items() if secret in result.stdout + result.stderr]
    return result


def printed(result):
    """The commands of a dry run."""
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines), result.stdout
    return [shlex.split(line[2:]) for line in lines]


def ssh(command, worker="all", place=("--zone=us-central2-b",)):
    return [*VM, "ssh", "pit", *place, f"--worker={worker}", f"--command={command}"]


def install(archive="/tmp/pit_jax.XXXXXX/pit_jax.tar.gz", share="", root=ROOT):
    unpack = "mkdir -p pit_jax && tar -xzf pit_jax.tar.gz -C pit_jax && bash pit_jax/launch/worker.sh install"
    return [
        ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        [*VM, "scp", archive, "pit:", "--zone=us-central2-b", "--worker=all"],
        ssh(unpack + share),
    ]


START = ssh(f"bash pit_jax/launch/worker.sh start {' '.join(TRAIN)}")
STATUS = ssh("bash pit_jax/launch/worker.sh status 2>/dev/null || echo 'pit_jax: absent'")
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="what goes to a slice is a commit of a git checkout"
)
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker.sh is for Linux: setsid, /proc")


@pytest.mark.parametrize(
    ("arguments", "more", "expected"),
    [
        (["create"], {}, [CREATE, STATE]),
        (
            ["create"],
            {"SPOT": "1", "CREATE_FLAGS": "--network=a --tags=b"},
            [[*CREATE, "--spot", "--network=a", "--tags=b"], STATE],
        ),
        (["create"], {"VERSION": "v2"}, [[*CREATE[:-1], "--runtime-version=v2"], STATE]),
        (["status"], {}, [STATE, STATUS]),
        (["logs"], {}, [ssh("bash pit_jax/launch/worker.sh log")]),
        (["stop"], {}, [ssh("bash pit_jax/launch/worker.sh stop")]),
        (["delete"], {}, [DELETE]),
        (["on", "0"], {}, [[*VM, "ssh", "pit", "--zone=us-central2-b", "--worker=0"]]),
        (["on", "all", "ls", "a b"], {}, [ssh(r"cd pit_jax && ls a\ b")]),
        (
            ["fetch", "/mnt/pit/a b", "to"],
            {},
            [[*VM, "scp", "--recurse", "pit:/mnt/pit/a b", "to", "--zone=us-central2-b", "--worker=0"]],
        ),
        (
            ["send", "a b", "/mnt/pit/a b"],
            {},
            [[*VM, "scp", "--recurse", "a b", "pit:/mnt/pit/a b", "--zone=us-central2-b", "--worker=0"]],
        ),
        (["run", *TRAIN], {}, [START]),
        (["run", *BUCKET], {}, [ssh(f"bash pit_jax/launch/worker.sh start {' '.join(BUCKET)}")]),
        (
            ["run", *TRAIN],
            {"PROJECT": "p"},
            [ssh(START[-1].removeprefix("--command="), place=("--zone=us-central2-b", "--project=p"))],
        ),
    ],
    ids=lambda value: "-".join(value)[:20] if isinstance(value, list) and isinstance(value[0], str) else None,
)
def test_tpu_vm_prints_what_it_would_run_and_runs_nothing(fakes, arguments, more, expected):
    fakes.add("gcloud")
    command, *rest = arguments
    assert printed(launch("tpu_vm.sh", command, "--dry-run", *rest, fakes=fakes, **SLICE, **more)) == expected
    assert printed(launch("tpu_vm.sh", "--dry-run", *arguments, fakes=fakes, **SLICE, **more)) == expected
    assert fakes.calls() == []


@needs_git
def test_tpu_vm_prints_an_installation_and_the_first_round_of_keep():
    share = {"SHARE": "10.0.0.2:/my pit"}
    assert printed(launch("tpu_vm.sh", "--dry-run", "install", **SLICE)) == install()
    assert printed(launch("tpu_vm.sh", "--dry-run", "install", **SLICE, **share)) == install(
        share=r" 10.0.0.2:/my\ pit"
    )
    assert printed(launch("tpu_vm.sh", "--dry-run", "keep", *TRAIN, **SLICE, **share)) == [
        *(STATE, CREATE, STATE, *install(share=r" 10.0.0.2:/my\ pit"), START, STATUS)
    ]
    start = ssh(f"bash pit_jax/launch/worker.sh start {' '.join(BUCKET)}")
    assert printed(launch("tpu_vm.sh", "--dry-run", "keep", *BUCKET, **SLICE)) == [
        *(STATE, CREATE, STATE, *install(), start, STATUS)
    ]


def test_arguments_come_through_the_shell_of_a_worker_as_they_were_typed(tmp_path, fakes):
    folder = tmp_path / "pit_jax/launch"
    folder.mkdir(parents=True)
    fakes.add("worker.sh", path=folder / "worker.sh")
    (command,) = printed(launch("tpu_vm.sh", "--dry-run", "run", *AWKWARD, **SLICE))
    line = command[-1].removeprefix("--command=")
    subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment(fakes), check=True, timeout=60)
    assert fakes.calls() == [["worker.sh", "start", *AWKWARD]]


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["create"], {"NAME": ""}, "Set NAME:"),
        (["create"], {"ZONE": ""}, "Set ZONE:"),
        (["run", *TRAIN], {"TYPE": ""}, "Set TYPE:"),
        (["create"], {"NAME": "Pit;"}, "NAME=Pit;: small letters"),
        (["create"], {"NAME": "pit-"}, "NAME=pit-: small letters"),
        (["create"], {"TYPE": "v4:4x4x4"}, "as in v4-64"),
        (["create"], {"TYPE": "v4-7"}, "TYPE=v4-7: v4 has multiples of 8"),
        (["--dry-run", "create"], {"TYPE": "v5p-12"}, "TYPE=v5p-12: v5p has multiples of 8"),
        (["create"], {"TYPE": "v5e-16"}, "Cloud TPU names it v5litepod-16"),
        (["create"], {"TYPE": "v5litepod-12"}, "v5litepod has 1, 4, 8, 16,"),
        (["create"], {"TYPE": "v9x-16"}, "Set VERSION"),
        (["install"], {"SHARE": "10.0.0.2"}, "SHARE=10.0.0.2: ADDRESS:/PATH"),
        (["--dry-run", "install"], {"SHARE": "/mnt/share"}, "SHARE=/mnt/share: ADDRESS:/PATH"),
        (["keep", *TRAIN], {**SHARE, "RETRIES": "many"}, "RETRIES=many is no number from 0 on"),
        (["keep", *TRAIN], {}, "--workdir=/mnt/pit/runs/7b is on no share: set SHARE=ADDRESS:/PATH"),
        (["crate"], {}, "There is no command crate."),
        (["create", "--spot"], {}, "takes no arguments, but there is --spot"),
        (["fetch", "a"], {}, "fetch REMOTE LOCAL"),
        (["send", "a"], {}, "send LOCAL REMOTE"),
        (["on"], {}, "on WORKER [COMMAND ...]"),
        (["run"], {}, "--config= is missing"),
        (["keep", "--config=a"], {}, "--workdir= is missing"),
        (["run", "--config=a", "--workdir=s3://b/c"], {}, "--workdir=s3://b/c: of buckets take gs://BUCKET/runs/NAME"),
        (["keep", "--config=a", "--workdir=gs://b"], {}, "--workdir=gs://b: of buckets take gs://BUCKET/runs/NAME"),
        (["fetch", "gs://b/runs/7b/report", "."], {}, "gcloud storage cp --recursive FROM TO"),
        (["send", "pairs", "gs://b/pairs"], {}, "gcloud storage cp --recursive FROM TO"),
        (["keep", "--config=a", "--workdir=runs/a"], {}, "another folder on each worker of v4-64"),
    ],
)
def test_tpu_vm_refuses_before_it_calls_anything(fakes, arguments, more, message):
    fakes.add("gcloud")
    result = launch("tpu_vm.sh", *arguments, fakes=fakes, **SLICE | more)
    assert (result.returncode, fakes.calls()) == (1, [])
    assert message in result.stderr


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-1", "v2-alpha-tpuv6e"),
        ("v3-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_kind_of_slice_has_a_runtime_of_its_own(kind, version):
    command, _ = printed(launch("tpu_vm.sh", "--dry-run", "create", **SLICE | {"TYPE": kind}))
    assert command[-2:] == [f"--accelerator-type={kind}", f"--runtime-version={version}"]
    command, _ = printed(launch("tpu_vm.sh", "--dry-run", "create", **SLICE | {"TYPE": kind}, VERSION="mine"))
    assert command[-1] == "--runtime-version=mine"


def test_one_worker_may_have_the_workdir_on_its_own_disk():
    (command,) = printed(
        launch("tpu_vm.sh", "--dry-run", "run", "--config=a", "--workdir=runs/a", **SLICE | {"TYPE": "v4-8"})
    )
    assert command[-1].endswith("start --config=a --workdir=runs/a")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_job.sh", "local.sh", "slurm.sh"])
def test_a_late_dry_run_is_no_argument_of_the_training(fakes, checkout, script):
    command = ["run"] if script in ("tpu_vm.sh", "gke_job.sh") else []
    for name in ("gcloud", "xpk", "sbatch"):
        fakes.add(name)
    result = launch(script, *command, *TRAIN, "--dry-run", fakes=fakes, root=checkout, **SLICE, CLUSTER="c")
    assert (result.returncode, fakes.calls()) == (1, [])
    assert "--dry-run stands before the other arguments" in result.stderr


@pytest.mark.parametrize("script", ["tpu_vm", "gke_job", "local", "slurm", "demo", "test", "bench", "peers", "worker"])
def test_help_is_the_head_of_the_file_and_nothing_is_done(fakes, checkout, script):
    for name in ("gcloud", "xpk", "sbatch", "srun"):
        fakes.add(name)
    for flag in ("--help", "-h"):
        result = launch(f"{script}.sh", flag, fakes=fakes, root=checkout)
        assert (result.returncode, fakes.calls(), result.stderr) == (0, [], "")
        first, *_ = result.stdout.splitlines()
        assert first == (ROOT / f"launch/{script}.sh").read_text().splitlines()[1].removeprefix("# ")
        assert f"launch/{script}.sh" in result.stdout and "set -euo" not in result.stdout
        assert not [line for line in result.stdout.splitlines() if line.startswith(("#", "SBATCH"))]


def test_the_demo_prints_what_it_would_run(fakes, checkout):
    python = [str(checkout / ".venv/bin/python"), "-m", "pit_jax.train"]
    demo = [*python, "--config=configs/pit_synthetic.py", "--workdir=runs/demo", "--config.seed=1"]
    assert printed(launch("demo.sh", "--dry-run", "--config.seed=1", fakes=fakes, root=checkout)) == [demo]
    result = launch("test.sh", "--dry-run", fakes=fakes, root=checkout)
    assert (result.returncode, fakes.calls()) == (1, []) and "has no --dry-run" in result.stderr


BENCH = ["-m", "pit_jax.bench"]


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (["--calls=2", "--works=a,b"], [["--works=a", "--calls=2"], ["--works=b", "--calls=2"]]),
        (["--json=a b"], [["--list"], ["--works=c", "--json=a b"], ["--works=d", "--json=a b"]]),
        (["--config=f.py", "--calls=2"], [["--config=f.py", "--calls=2"]]),
        (["--calls=2", "--grow", "batch"], [["--calls=2", "--grow", "batch"]]),
        (["--list"], [["--list"]]),
    ],
)
def test_each_work_is_measured_in_a_process_of_its_own(fakes, checkout, arguments, calls):
    add_python(fakes, checkout, '[ "$3" != --list ] || echo c,d')
    assert launch("bench.sh", *arguments, fakes=fakes, root=checkout).returncode == 0
    found = [call[1:] for call in fakes.calls() if call[1:3] == BENCH]
    assert found == [[*BENCH, *call] for call in calls]
    wrong = launch("bench.sh", "--works", "a", fakes=fakes, root=checkout)
    assert wrong.returncode == 1 and "--works=NAME,NAME wants an equals sign" in wrong.stderr


PEERS = ["--works=dpo_small,ppo_tiny_e4", "--rounds=2"]
CPU_OF_AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512dq\n"
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def peer_installs(root, folder):
    """(arguments of pip) in the order of two installations."""
    torch, jax = f"{folder}/venv-torch/bin/python", f"{folder}/venv-jax/bin/python"
    index = ["--retries", "1", "--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0"]
    return [
        [torch, *PIP, *index],
        [torch, *PIP, "--requirement", f"{root}/launch/peers/torch.txt"],
        [torch, *PIP, "--upgrade", "--no-deps", "--target", f"{folder}/trl-1.12", "trl==1.12.0"],
        [jax, *PIP, "--requirement", f"{root}/launch/peers/jax.txt"],
    ]


def test_peers_print_what_they_would_run(fakes, checkout, tmp_path):
    folder, cpu = tmp_path / "peers", tmp_path / "cpuinfo"
    cpu.write_text(CPU_OF_AMD)
    fakes.add("cc")
    settings = {"fakes": fakes, "root": checkout, "PIT_JAX_PEERS": str(folder), "CPUINFO": str(cpu)}
    found = printed(launch("peers.sh", *PEERS, "--calls=2", "--dry-run", **settings))
    torch, jax = (f"{folder}/venv-{name}" for name in ("torch", "jax"))
    installs, python = peer_installs(checkout, folder), f"{checkout}/.venv/bin/python"
    library = f"{folder}/avx512.so"
    assert found[:9] == [
        ["python3", "-m", "venv", "--clear", torch], *installs[:3], ["python3", "-m", "venv", "--clear", jax],
        installs[3],
        ["cc", "-shared", "-fPIC", "-o", library, f"{checkout}/launch/peers/avx512.c"],
        ["rm", "-f", f"{folder}/works.jsonl"],
        [python, "-m", "pit_jax.bench", "--list", f"--json={folder}/works.jsonl"],
    ]  # fmt: skip
    dpo, ppo = (
        [(torch, "trl", ""), (torch, "trl", "stored"), (torch, "trl", "stored+compile"), (jax, "tunix", "")],
        [(torch, "trl", ""), (jax, "tunix", "")],
    )
    ours = (f"{checkout}/.venv", "pit_jax", "")
    twice = lambda first, *rest: [first, *rest, *rest, first]  # noqa: E731
    turns = [("dpo_small", turn) for turn in twice(*dpo, ours)] + [("ppo_tiny_e4", turn) for turn in twice(*ppo, ours)]
    for command, (work, (place, name, variant)) in zip(found[9:], turns, strict=True):
        start = command.index(f"{place}/bin/python")
        assert command[start + 1 :] == [
            f"{checkout}/launch/peers/with_{name}.py", f"--works={folder}/works.jsonl", f"--work={work}",
            *([f"--variant={variant}"] if variant else []), "--calls=2", "--out=ROW",
        ]  # fmt: skip
        variables = dict(part.split("=", 1) for part in command[1:start])
        assert command[0] == "env" and variables["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
        assert variables.get("LD_PRELOAD") == (library if place == torch else None)
        old = f"{folder}/trl-1.12" if (work, name) == ("ppo_tiny_e4", "trl") else ""
        assert variables["PYTHONPATH"] == (str(checkout) if name == "pit_jax" else old)
    spaces = settings | {"PIT_JAX_PEERS": "my peers"}  # counts from the repository root, whose name here has one too
    result = launch("peers.sh", "--dry-run", *PEERS, **spaces)
    assert result.returncode == 1 and f"{checkout}/my peers has a space or a colon" in result.stderr
    stock = printed(launch("peers.sh", "--dry-run", "--stock", *PEERS, **spaces, GLIBC_TUNABLES="glibc.a=1"))
    assert "cc" not in [command[0] for command in stock]
    for command in stock[8:]:
        assert "GLIBC_TUNABLES=glibc.a=1" in command and "LD_PRELOAD" not in " ".join(command)
    assert fakes.calls() == [] and not folder.exists()


@pytest.mark.parametrize(
    "cpu", ["vendor_id\t: GenuineIntel\nflags\t: avx512f\n", "vendor_id: AuthenticAMD\nflags: avx2\n"]
)
def test_only_processors_of_amd_with_avx512_are_told_to_use_it(fakes, checkout, tmp_path, cpu):
    fakes.add("cc")
    (tmp_path / "cpuinfo").write_text(cpu)
    settings = {"PIT_JAX_PEERS": str(tmp_path / "peers"), "CPUINFO": str(tmp_path / "cpuinfo")}
    result = launch("peers.sh", "--dry-run", fakes=fakes, root=checkout, **settings)
    assert "avx512" not in "".join(map(" ".join, printed(result))) and "compiler" not in result.stderr


FAKE_VENV = """case "$1 $2" in "-m venv")
  folder="${@: -1}"; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python"; ln -sf python "$folder/bin/python3" ;;
"-m pip") case "$*" in *"$FAILS"*) echo "no such version" >&2; exit 1 ;; esac ;;
esac
case "$0 $*" in *venv*pip*) printf '%s\\x1f' "$0" "$@" >>"$FAKES/pip"; printf '\\x1e' >>"$FAKES/pip" ;; esac"""


def test_peers_are_installed_once(fakes, checkout, tmp_path):
    """A failure is told, does not keep the rest from running, and is mended by the next start."""
    folder = tmp_path / "peers"
    fakes.add("python3", FAKE_VENV)
    fakes.add("cc", "exit 1")
    fakes.add("gcc", "exit 1")
    fakes.add("clang", "exit 1")
    (tmp_path / "cpuinfo").write_text(CPU_OF_AMD)

    def started(fails):
        before = len(fakes.calls())
        settings = {"PIT_JAX_PEERS": str(folder), "CPUINFO": str(tmp_path / "cpuinfo"), "FAILS": fails}
        result = launch("peers.sh", *PEERS, fakes=fakes, root=checkout, **settings)
        assert result.returncode == 0, result.stderr
        last = fakes.calls()[-1]
        assert last[:2] == ["python", "launch/peers/compare.py"] and last[-2:] == PEERS and "--avx512=" in last
        assert "There is no C compiler that works" in result.stderr
        pip = (fakes.folder / "pip").read_text().split("\x1e")[:-1] if (fakes.folder / "pip").exists() else []
        (fakes.folder / "pip").unlink(missing_ok=True)
        assert ["python", "-m", "pit_jax.bench", "--list", f"--json={folder}/works.jsonl"] in fakes.calls()[before:]
        return [call.split("\x1f")[:-1] for call in pip], result.stderr

    installs = peer_installs(checkout, folder)
    assert started("peers/torch.txt")[0] == installs[:1] + installs[3:]
    pip, said = started("trl==1.12.0")
    assert pip == installs[:2] and "Installing what venv-torch needs failed" in said
    assert "no such version" in said and not (folder / "torch.installed").exists()
    pip, said = started("--index-url")
    assert pip == installs[1:3] and "That index is out of reach" in said
    assert started("nothing fails")[0] == []
    (checkout / "launch/peers/jax.txt").write_text("google-tunix==9\n")
    assert started("nothing fails")[0] == installs[3:]


def cloud(fakes, states, said=("pit_jax: ended 0",), create="", more=""):
    """A gcloud whose slice is in one state after the other, and whose workers say one thing after the other."""
    does = f"""case "$*" in
  *"queued-resources list"*) next states ;;
  *"queued-resources create"*) {create or ":"} ;;
  *"worker.sh status"*) next said ;;
  {more}
esac"""
    fakes.add("gcloud", does, states=list(states), said=list(said))


def kinds(fakes):
    """What gcloud was asked to change: create, delete, install, start."""
    found = []
    for call in fakes.calls():
        for kind in ("create", "delete"):
            if call[4] == kind:
                found.append(kind)
        for kind in ("install", "start"):
            if f"worker.sh {kind}" in call[-1]:
                found.append(kind)
    return found


def test_create_waits_in_the_queue(fakes):
    cloud(fakes, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert launch("tpu_vm.sh", "create", fakes=fakes, **SLICE).returncode == 0
    assert fakes.calls() == [CREATE, STATE, STATE, STATE]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", ""])
def test_create_ends_where_the_slice_will_not_come(fakes, state):
    cloud(fakes, ["WAITING_FOR_RESOURCES", state])
    result = launch("tpu_vm.sh", "create", fakes=fakes, **SLICE)
    assert result.returncode == 1
    assert f"The request for pit is {state or 'gone'}." in result.stderr


GOES_ON = "install start".split()


@needs_git
@pytest.mark.parametrize(
    ("states", "said", "status", "expected"),
    [
        pytest.param(
            ["", "WAITING_FOR_RESOURCES", "ACTIVE"],
            ["pit_jax: absent", "pit_jax: running", "pit_jax: ended 0"],
            *(0, ["create", *GOES_ON]),
            id="from nothing",
        ),
        pytest.param(
            ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "PROVISIONING", "ACTIVE"],
            ["pit_jax: absent", "pit_jax: running", "pit_jax: absent", "pit_jax: running", "pit_jax: ended 0"],
            *(0, [*GOES_ON, "delete", "create", *GOES_ON]),
            id="taken away",
        ),
        pytest.param(
            ["ACTIVE"],
            [r"pit_jax: running\npit_jax: ended 0", r"pit_jax: ended 0\npit_jax: ended 0"],
            0,
            [],
            id="one is ready",
        ),
        pytest.param(["ACTIVE"], ["pit_jax: ended 75", "pit_jax: ended 0"], 0, ["start"], id="machines started anew"),
        pytest.param(["ACTIVE"], ["pit_jax: idle", "pit_jax: ended 0"], 0, ["start"], id="not begun"),
        pytest.param(
            ["ACTIVE"], [r"pit_jax: ended 134\npit_jax: ended 0", "pit_jax: ended 0"], 0, ["start"], id="one crashed"
        ),
        pytest.param(["ACTIVE"], ["exit 255", "exit 255", "pit_jax: ended 0"], 0, [], id="out of reach for a while"),
        pytest.param(["exit 1", "exit 1", "ACTIVE"], ["pit_jax: ended 0"], 0, [], id="no network for a while"),
        pytest.param(["exit 1"], [], 1, [], id="no network"),
        pytest.param(["ACTIVE"], ["exit 255"], 1, [], id="out of reach"),
        pytest.param(["FAILED"], [], 1, [], id="request failed"),
        pytest.param(["ACTIVE"], [r"pit_jax: running\npit_jax: ended 2"], 1, [], id="a mistake"),
        pytest.param(["ACTIVE"], ["pit_jax: ended 1"], 1, ["start"] * 3, id="fails again and again"),
        pytest.param(["ACTIVE"], ["pit_jax: ended 20", "pit_jax: ended 0"], 0, ["start"], id="20 is not 2"),
    ],
)
def test_keep(fakes, states, said, status, expected):
    cloud(fakes, states, said or ["exit 1"])
    result = launch("tpu_vm.sh", "keep", *TRAIN, fakes=fakes, **SLICE, **SHARE, POLL="0")
    assert (result.returncode, kinds(fakes)) == (status, expected), result.stderr


def test_keep_asks_for_a_slice_once_where_there_is_no_quota(fakes):
    cloud(fakes, [""], create="echo 'Quota exceeded' >&2; exit 1")
    result = launch("tpu_vm.sh", "keep", *TRAIN, fakes=fakes, **SLICE, **SHARE)
    assert (result.returncode, kinds(fakes)) == (1, ["create"])
    assert "Quota exceeded" in result.stderr
    assert "The slice was not asked for" in result.stderr


@pytest.mark.parametrize(("refusals", "status", "deletions"), [(1, 0, 2), (9, 1, 4)])
def test_keep_tries_again_where_a_slice_is_not_deleted(fakes, refusals, status, deletions):
    """Once, as without network for a moment, or for good."""
    states = ["SUSPENDED"] * (refusals + 1) + ["ACTIVE"]
    does = 'echo >>"$FAKES/tried"; [ "$(wc -l <"$FAKES/tried")" -gt ' + f"{refusals} ] || exit 1"
    cloud(fakes, states, ["pit_jax: ended 0"], more=f'*"queued-resources delete"*) {does} ;;')
    result = launch("tpu_vm.sh", "keep", *TRAIN, fakes=fakes, **SLICE, **SHARE, POLL="0")
    assert (result.returncode, kinds(fakes)) == (status, ["delete"] * deletions), result.stderr


@needs_git
def test_keep_ends_where_the_installation_fails_each_time(fakes):
    cloud(fakes, ["ACTIVE"], ["pit_jax: absent"], more='*" scp "*) exit 1 ;;')
    result = launch("tpu_vm.sh", "keep", *TRAIN, fakes=fakes, **SLICE, **SHARE, RETRIES="1")
    assert (result.returncode, kinds(fakes)) == (1, [])
    assert "failed 2 times" in result.stderr


def commit(root):
    """Makes a checkout a commit, beside which lies a file with a key."""
    for arguments in (["init", "--quiet"], ["add", "launch"], ["commit", "--quiet", "--message=."]):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(root), *settings, *arguments], check=True, timeout=60)
    (root / ".env").write_text(SECRETS["OPENAI_API_KEY"])


def test_what_goes_to_the_workers_is_the_commit_and_no_key(fakes, checkout):
    commit(checkout)
    fakes.add("gcloud", 'for file in "$@"; do [ ! -f "$file" ] || cp "$file" "$FAKES/sent"; done')
    assert launch("tpu_vm.sh", "install", fakes=fakes, root=checkout, **SLICE).returncode == 0
    archive = next(call for call in fakes.calls() if call[4] == "scp")[5]
    assert fakes.calls() == install(archive, root=checkout)[1:]
    assert not Path(archive).parent.exists()
    with tarfile.open(fakes.folder / "sent") as tar:
        names = tar.getnames()
    assert "launch/worker.sh" in names
    assert all(name == "launch" or name.startswith("launch/") for name in names)


def until(condition):
    """Waits, ten seconds at most."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("that did not happen in ten seconds")


WAITS = """trap 'echo TERM >>"$FAKES/told"; exit 75' TERM
echo here >>"$FAKES/here"
for _ in {1..600}; do sleep 0.02; done"""


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@needs_linux
def test_a_worker_trains_in_the_background(fakes, checkout):
    def worker(*arguments):
        result = launch("worker.sh", *arguments, fakes=fakes, root=checkout, PATIENCE="400")
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert worker("status") == "pit_jax: idle\n"
    worker("stop")
    add_python(fakes, checkout, WAITS)
    assert worker("start", *AWKWARD) == "pit_jax: started\n"
    until(lambda: lines(fakes.folder / "here"))
    assert worker("status") == "pit_jax: running\n"
    worker("start", *TRAIN)  # the first has to save and end before
    assert lines(fakes.folder / "told") == ["TERM"]
    until(lambda: len(lines(fakes.folder / "here")) == 2)
    worker("stop")
    assert worker("status") == "pit_jax: ended 75\n"
    assert lines(fakes.folder / "told") == ["TERM", "TERM"]
    add_python(fakes, checkout, "exit 2")
    worker("start", *TRAIN)
    until(lambda: worker("status") == "pit_jax: ended 2\n")
    trained = [call[3:] for call in fakes.calls() if call[:3] == ["python", "-m", "pit_jax.train"]]
    assert trained == [AWKWARD, TRAIN, TRAIN]


@needs_linux
def test_a_worker_installs_what_a_bucket_needs(fakes, checkout):
    for count, arguments in enumerate((BUCKET, BUCKET, TRAIN), 1):
        assert launch("worker.sh", "start", *arguments, fakes=fakes, root=checkout).returncode == 0
        until(lambda count=count: len(trained(fakes)) == count)
    installed = [call[-1] for call in fakes.calls() if call[1:3] == ["-m", "pip"]]
    assert [name.rpartition("hf")[2] for name in installed] == [",gcs]", "]"], "the bucket's once"


@needs_linux
def test_a_worker_says_which_one_it_is(fakes, checkout):
    fakes.add("hostname", "echo t1v-n-0a1b2c3d-w-3")
    (checkout / "train.log").write_text("one\ntwo\n")
    command = ["bash", checkout / "launch/worker.sh", "log"]
    process = subprocess.Popen(
        command, env=environment(fakes), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["[3] one\n", "[3] two\n"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=10)


@needs_linux
def test_a_worker_is_installed(fakes, checkout):
    fakes.add("python3")  # new enough
    fakes.add("sudo")
    fakes.add("mountpoint", "exit 1")
    result = launch("worker.sh", "install", "10.0.0.2:/my pit", fakes=fakes, root=checkout)
    assert result.returncode == 0, result.stderr
    calls = fakes.calls()
    assert ["sudo", "mount", "-t", "nfs", "10.0.0.2:/my pit", "/mnt/pit"] in calls
    pip = ["python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraint = ["--constraint", "launch/requirements.lock", "--editable"]
    assert [call for call in calls if call[:3] == pip[:3]] == [[*pip, *constraint, ".[report,tpu,hf]"]]
    fakes.add("mountpoint")  # again: it is mounted, and nothing has changed
    assert launch("worker.sh", "install", "10.0.0.2:/my pit", fakes=fakes, root=checkout).returncode == 0
    more = fakes.calls()[len(calls) :]
    assert not [call for call in more if call[0] == "sudo" or call[:3] == pip[:3]]


def trained(fakes):
    return [call[3:] for call in fakes.calls() if call[1:3] == ["-m", "pit_jax.train"]]


@pytest.mark.parametrize(
    ("ends", "status"),
    [(["exit 75", "exit 75", "exit 0"], 0), (["exit 75", "exit 3"], 3), (["exit 2"], 2), (["exit 143"], 143)],
)
def test_local_goes_on_after_status_75_alone(fakes, checkout, ends, status):
    add_python(fakes, checkout, "next ends", ends=ends)
    result = launch("local.sh", *AWKWARD, fakes=fakes, root=checkout)
    assert result.returncode == status, result.stderr
    assert trained(fakes) == [AWKWARD] * len(ends)
    assert lines(fakes.folder / "found") == [""] * len(ends)


def test_local_starts_processes_that_find_each_other(fakes, checkout):
    ends = {f"ends_{process}": ["exit 75", "exit 0"] for process in range(3)}
    add_python(fakes, checkout, 'next "ends_$PIT_JAX_PROCESS_ID"', **ends)
    result = launch("local.sh", *TRAIN, fakes=fakes, root=checkout, PROCESSES="3", PORT="1234")
    assert result.returncode == 0, result.stderr
    address = "PIT_JAX_COORDINATOR=127.0.0.1:1234 PIT_JAX_NUM_PROCESSES=3 PIT_JAX_PROCESS_ID="
    assert sorted(line.strip() for line in lines(fakes.folder / "found")) == sorted(
        2 * [f"{address}{i}" for i in range(3)]
    )
    assert trained(fakes) == 6 * [TRAIN]


def test_local_ends_the_others_where_one_crashes(fakes, checkout):
    add_python(fakes, checkout, f'if [ "$PIT_JAX_PROCESS_ID" = 1 ]; then sleep 0.2; exit 5; fi; {WAITS}')
    result = launch("local.sh", *TRAIN, fakes=fakes, root=checkout, PROCESSES="2")
    assert (result.returncode, lines(fakes.folder / "told")) == (5, ["TERM"])


@pytest.mark.parametrize(
    ("number", "status", "grace"), [(signal.SIGUSR1, 75, "60"), (signal.SIGINT, 130, "60"), (signal.SIGTERM, 75, "0")]
)
def test_local_passes_a_signal_on_and_does_not_start_again(tmp_path, fakes, checkout, number, status, grace):
    add_python(fakes, checkout, WAITS)
    more = {"STATUS_FILE": str(tmp_path / "status"), "GRACE": grace}
    # As at a terminal: what a shell has put into the background, which tests may be, ignores Ctrl-C.
    not_ignored = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    command = ["bash", checkout / "launch/local.sh", *TRAIN]
    process = subprocess.Popen(command, env=environment(fakes, **more), preexec_fn=not_ignored)
    until(lambda: lines(fakes.folder / "here"))
    process.send_signal(number)
    assert process.wait(10) == status
    assert lines(fakes.folder / "told") == ["TERM"]
    assert lines(fakes.folder / "here") == ["here"]
    assert lines(tmp_path / "status") == [str(status)]


def test_local_does_not_repeat_what_a_machine_that_shuts_down_tells_everyone(fakes, checkout):
    add_python(
        fakes,
        checkout,
        'trap \'echo TERM >>"$FAKES/told"; asked=1\' TERM; echo $$ >>"$FAKES/here"\n'
        'while [ -z "$asked" ]; do sleep 0.02; done; sleep 0.5; exit 75',
    )
    process = subprocess.Popen(["bash", checkout / "launch/local.sh", *TRAIN], env=environment(fakes))
    until(lambda: lines(fakes.folder / "here"))
    process.send_signal(signal.SIGTERM)
    os.kill(int(lines(fakes.folder / "here")[0]), signal.SIGTERM)
    assert process.wait(10) == 75
    assert lines(fakes.folder / "told") == ["TERM"]
    assert len(lines(fakes.folder / "here")) == 1


def test_local_prints_what_it_would_run(fakes, checkout):
    python = [str(checkout / ".venv/bin/python"), "-m", "pit_jax.train"]
    assert printed(launch("local.sh", "--dry-run", *AWKWARD, fakes=fakes, root=checkout)) == [python + AWKWARD]
    found = printed(launch("local.sh", "--dry-run", *TRAIN, fakes=fakes, root=checkout, PROCESSES="2", PORT="1"))
    for i, command in enumerate(found):
        address = ["PIT_JAX_COORDINATOR=127.0.0.1:1", "PIT_JAX_NUM_PROCESSES=2", f"PIT_JAX_PROCESS_ID={i}"]
        assert command[:4] == ["env", *address]
        assert command[-5:] == [*python, *TRAIN]
    assert len(found) == 2
    assert fakes.calls() == []


WRONG_RUNS = [
    ([], {}, "What is to be run?"),
    (TRAIN[:1], {}, "--workdir= is missing"),
    (TRAIN[1:], {}, "--config= is missing"),
    ([TRAIN[0], "--workdir="], {}, "--workdir= is empty"),
    (["--config=configs/pit_lama2.py:7b", TRAIN[1]], {}, "There is no config file configs/pit_lama2.py in"),
]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [*WRONG_RUNS, (TRAIN, {"PROCESSES": "two"}, "PROCESSES=two"), (TRAIN, {"PROCESSES": "0"}, "PROCESSES=0")],
)
def test_local_refuses(fakes, checkout, dry, arguments, more, message):
    result = launch("local.sh", *dry, *arguments, fakes=fakes, root=checkout, **more)
    assert (result.returncode, fakes.calls(), result.stdout) == (1, [], "")
    assert message in result.stderr


def test_another_extra_is_installed_beside_what_is_there(fakes, checkout):
    for extra in ("", "hf", "hf", ""):
        assert launch("local.sh", *TRAIN, fakes=fakes, root=checkout, EXTRA=extra).returncode == 0
    installed = [call[-1] for call in fakes.calls() if call[1:3] == ["-m", "pip"]]
    assert [name.endswith(",hf]") for name in installed] == [False, True]


def test_what_is_within_the_installed_extras_is_not_installed(fakes, checkout):
    (checkout / ".venv/.installed-test").write_text("key\n")
    assert launch("demo.sh", "--config.seed=1", fakes=fakes, root=checkout).returncode == 0
    assert trained(fakes) == [["--config=configs/pit_synthetic.py", "--workdir=runs/demo", "--config.seed=1"]]
    assert not [call for call in fakes.calls() if call[1:3] == ["-m", "pip"]]
    assert launch("local.sh", *TRAIN, fakes=fakes, root=checkout, EXTRA="hf").returncode == 0
    assert len([call for call in fakes.calls() if call[1:3] == ["-m", "pip"]]) == 1


def sbatch(root, *flags):
    return ["sbatch", f"--chdir={root}", *flags, str(root / "launch/slurm.sh")]


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ({}, ["--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8"]),
        (
            {"NODES": "4", "GPUS": "2", "CPUS": "6"},
            ["--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=6"],
        ),
        ({"GPUS": "0"}, ["--nodes=1", "--ntasks-per-node=1"]),
    ],
    ids=["one node", "four nodes", "no GPU"],
)
def test_slurm_submits_itself(fakes, checkout, more, flags):
    for name in ("sbatch", "srun", "scontrol"):
        fakes.add(name, 'echo "JAX_PLATFORMS=${JAX_PLATFORMS-unset}" >>"$FAKES/platforms"')
    train = ["srun", "--kill-on-bad-exit=0", "--wait=600", str(checkout / ".venv/bin/python"), "-m", "pit_jax.train"]
    expected = [*sbatch(checkout, *flags), *AWKWARD]
    dry = launch("slurm.sh", "--dry-run", *AWKWARD, fakes=fakes, root=checkout, **more)
    assert printed(dry) == [expected, [*train, *AWKWARD], ["scontrol", "requeue", "JOB"]]
    assert fakes.calls() == []
    result = launch("slurm.sh", *AWKWARD, fakes=fakes, root=checkout, **more)
    assert result.returncode == 0, result.stderr
    assert [call for call in fakes.calls() if call[0] != "python"] == [expected]
    assert lines(fakes.folder / "platforms") == ["JAX_PLATFORMS=unset"]  # this machine may have no GPU
    installed = [call[-1] for call in fakes.calls() if call[1:3] == ["-m", "pip"]]
    assert installed == [".[report]" if more.get("GPUS") == "0" else ".[report,cuda]"]


@pytest.mark.parametrize(("status", "requeues"), [(0, False), (75, True), (1, False), (143, False)])
def test_a_slurm_job_queues_again_after_status_75(tmp_path, fakes, checkout, status, requeues):
    fakes.add("srun", f"exit {status}")
    fakes.add("scontrol")
    spool = tmp_path / "slurm_script"  # sbatch runs a copy
    shutil.copy(checkout / "launch/slurm.sh", spool)
    more = environment(fakes, SLURM_JOB_ID="77", SLURM_CPUS_PER_TASK="6")
    result = subprocess.run(["bash", spool, *AWKWARD], cwd=checkout, env=more, timeout=60, capture_output=True)
    assert result.returncode == status, result.stderr
    train, *rest = fakes.calls()
    assert train[-len(AWKWARD) - 3 :] == [str(checkout / ".venv/bin/python"), "-m", "pit_jax.train", *AWKWARD]
    assert rest == ([["scontrol", "requeue", "77"]] if requeues else [])


def test_slurm_options_of_the_file():
    text = (ROOT / "launch/slurm.sh").read_text()
    head = text[: text.index("\nset -euo")]  # sbatch reads no further than the first command
    for option in ("--requeue", "--signal=TERM@300", "--open-mode=append"):
        assert f"\n#SBATCH {option}\n" in head + "\n"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        *WRONG_RUNS,
        (TRAIN, {"GPUS": "all"}, "GPUS=all"),
        (TRAIN, {"NODES": "0"}, "NODES=0"),
        (TRAIN, {"CPUS": "0"}, "CPUS=0 is no number from 1 on"),
    ],
)
def test_slurm_refuses(fakes, checkout, dry, arguments, more, message):
    fakes.add("sbatch")
    result = launch("slurm.sh", *dry, *arguments, fakes=fakes, root=checkout, **more)
    assert (result.returncode, fakes.calls(), result.stdout) == (1, [], "")
    assert message in result.stderr


CLUSTER = {"CLUSTER": "c", "TYPE": "v4-64", "NAME": "pit-7b"}
WORKLOAD = [
    *("xpk", "workload", "create", "--cluster=c", "--workload=pit-7b", "--tpu-type=v4-64"),
    *("--env=PIT_JAX_DISTRIBUTED=1", "--max-restarts=50", "--restart-on-exit-codes=75"),
    "--termination-grace-period-seconds=300",
]
STORAGE = "--storage=pit"


@pytest.mark.parametrize(
    ("arguments", "more", "expected"),
    [
        (
            ["create"],
            {},
            ["xpk", "cluster", "create", "--cluster=c", "--tpu-type=v4-64", "--num-slices=1", "--on-demand"],
        ),
        (
            ["create"],
            {"SPOT": "1", "SLICES": "2", "PROJECT": "p", "ZONE": "z"},
            [
                "xpk",
                "cluster",
                "create",
                "--cluster=c",
                "--project=p",
                "--zone=z",
                "--tpu-type=v4-64",
                "--num-slices=2",
                "--spot",
            ],
        ),
        (
            ["storage"],
            {},
            [
                "xpk",
                "storage",
                "create",
                "pit",
                "--cluster=c",
                "--type=gcpfilestore",
                "--tier=BASIC_SSD",
                "--size=2560",
                "--vol=default",
                "--mount-point=/mnt/pit",
                "--readonly=false",
                "--auto-mount=false",
            ],
        ),
        (
            ["logs"],
            {},
            [
                "kubectl",
                "logs",
                "--follow",
                "--prefix",
                "--max-log-requests=64",
                "--selector=xpk.google.com/workload=pit-7b",
            ],
        ),
        (["status"], {}, ["xpk", "workload", "list", "--cluster=c", "--filter-by-job=pit-7b"]),
        (["delete"], {}, ["xpk", "workload", "delete", "--cluster=c", "--workload=pit-7b"]),
    ],
    ids=lambda value: "-".join(value)[:20] if isinstance(value, list) and len(value) == 1 else None,
)
def test_gke_prints_what_it_would_run_and_runs_nothing(fakes, arguments, more, expected):
    for name in ("xpk", "kubectl"):
        fakes.add(name)
    dry = launch("gke_job.sh", "--dry-run", *arguments, fakes=fakes, **CLUSTER, **more)
    assert (printed(dry), fakes.calls()) == ([expected], [])
    assert launch("gke_job.sh", *arguments, fakes=fakes, **CLUSTER, **more).returncode == 0
    assert fakes.calls() == [expected]


def test_a_gke_run_is_the_commit_in_an_image_and_python_gets_its_signals(tmp_path, fakes, checkout):
    commit(checkout)
    fakes.add("xpk", 'for a in "$@"; do case "$a" in --script-dir=*) find "${a#*=}" >"$FAKES/sent" ;; esac; done')
    dry = printed(launch("gke_job.sh", "--dry-run", "run", *AWKWARD, fakes=fakes, root=checkout, **CLUSTER))
    assert fakes.calls() == []
    assert launch("gke_job.sh", "run", *AWKWARD, fakes=fakes, root=checkout, **CLUSTER).returncode == 0
    (real,) = fakes.calls()
    folder = next(argument for argument in real if argument.startswith("--script-dir=")).removeprefix("--script-dir=")
    assert [argument.replace(str(Path(folder).parent), "/tmp/pit_jax.XXXXXX") for argument in real] == dry[-1]
    assert real[:-1] == [*WORKLOAD, STORAGE, "--base-docker-image=python:3.11", f"--script-dir={folder}"]
    sent = lines(fakes.folder / "sent")
    assert f"{folder}/launch/requirements.lock" in sent
    assert not [path for path in sent if path.endswith(".env")]
    assert not Path(folder).parent.exists()
    # What the shell of a container makes of the command; xpk writes it on one line.
    fakes.add("python", 'echo "$PPID" >>"$FAKES/parent"')
    line = real[-1].removeprefix("--command=")
    assert "\n" not in line
    assert "&& exec python -m pit_jax.train" in line  # a bash of today does that by itself, but not all do
    shell = subprocess.Popen(["bash", "-c", f"echo $$ >{tmp_path}/shell; ({line}) & wait"], env=environment(fakes))
    assert shell.wait(10) == 0
    pip, train = fakes.calls()[1:]
    assert pip[1:] == "-m pip install --quiet --constraint launch/requirements.lock .[report,tpu,hf]".split()
    assert train == ["python", "-m", "pit_jax.train", *AWKWARD]
    assert lines(fakes.folder / "parent")[1] == lines(tmp_path / "shell")[0]  # exec: no shell between


def test_a_gke_run_with_an_image_of_ones_own():
    found = printed(launch("gke_job.sh", "--dry-run", "run", *TRAIN, **CLUSTER, IMAGE="gcr.io/p/pit:1"))
    command = f"--command=exec python -m pit_jax.train {' '.join(TRAIN)}"
    assert found == [[*WORKLOAD, STORAGE, "--docker-image=gcr.io/p/pit:1", command]]


@needs_git
def test_a_gke_run_with_its_workdir_in_a_bucket():
    """Its pairs may lie on the share; where nothing does, none is mounted."""
    pairs = "--config.data.path=/mnt/pit/pairs"
    for more, storage in (([], []), ([pairs], [STORAGE])):
        *_, found = printed(launch("gke_job.sh", "--dry-run", "run", *BUCKET, *more, **CLUSTER))
        train = f"exec python -m pit_jax.train {' '.join([*BUCKET, *more])}"
        assert found[: len(WORKLOAD) + len(storage) + 1] == [*WORKLOAD, *storage, "--base-docker-image=python:3.11"]
        pip = "python -m pip install --quiet --constraint launch/requirements.lock '.[report,tpu,hf,gcs]'"
        assert found[-1] == f"--command={pip} && {train}"


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["run", *TRAIN], {"NAME": ""}, "Set NAME:"),
        (["create"], {"CLUSTER": ""}, "Set CLUSTER:"),
        (["creat"], {}, "There is no command creat."),
        (["run", *TRAIN], {"NAME": "Pit;"}, "NAME=Pit;: small letters"),
        (["--dry-run", "create"], {"TYPE": "v4-7"}, "TYPE=v4-7: v4 has multiples of 8"),
        (["run", *TRAIN], {"RESTARTS": "-1"}, "RESTARTS=-1 is no number from 0 on"),
        (["storage"], {"SIZE": "1TB"}, "SIZE=1TB is no number from 2560 on"),
        (["storage"], {"SIZE": "100"}, "SIZE=100 is no number from 2560 on"),
        (["create"], {"SLICES": "0"}, "SLICES=0 is no number from 1 on"),
        (["delete", "all"], {}, "takes no arguments"),
        (["run", "--config=a"], {}, "--workdir= is missing"),
        (["run", "--config=a", "--workdir=runs/a"], {}, "--workdir=runs/a is lost"),
        (["run", "--config=a", "--workdir=s3://b/a"], {}, "--workdir=s3://b/a is lost"),
    ],
)
def test_gke_refuses_before_it_calls_anything(fakes, arguments, more, message):
    fakes.add("xpk")
    result = launch("gke_job.sh", *arguments, fakes=fakes, **CLUSTER | more)
    assert (result.returncode, fakes.calls()) == (1, [])
    assert message in result.stderr
