# shellcheck shell=bash
# Sourced by the scripts of this folder: environment variables and the virtual environment in .venv.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

fail() {
  printf '%s\n' "" "$@" >&2
  exit 1
}

# A command as one could type it, which then runs; under --dry-run (DRY_RUN=1) it is printed and does not run.
call() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '+%s\n' "$(quoted "$@")"
  else
    printf '+%s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# What stands at the head of a script, where that is asked for.
help_if_asked() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help) print_head "${BASH_SOURCE[1]}"; exit 0 ;;
    esac
  done
}

print_head() {
  sed -nE '2,/^set /{/^#( |$)/s/^# ?//p;}' "$1"
}

# check_run COMMAND ARGUMENT ...: arguments of pit_jax.train; paths count from the repository root.
check_run() {
  local needed argument path
  for needed in --config= --workdir=; do
    [[ "$(quoted "${@:2}")" == *" $needed"* ]] || fail "$needed is missing: bash $1 --config=FILE --workdir=FOLDER"
  done
  for argument in "${@:2}"; do
    case "$argument" in
      --config=*)
        path="${argument#--config=}"
        path="${path%%:*}"
        (cd "$ROOT" && [ -f "$path" ]) || fail "There is no config file $path in $ROOT." ;;
      --workdir=) fail "--workdir= is empty: name a folder." ;;
    esac
  done
}

# Names of slices and of runs.
check_name() {
  [[ "${!1}" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "$1=${!1}: small letters, digits and hyphens, a letter first and no hyphen last."
}

# check_number VARIABLE LEAST: what a variable holds, where it is set.
check_number() {
  [[ "${!1:-$2}" =~ ^(0|[1-9][0-9]{0,8})$ && "${!1:-$2}" -ge "$2" ]] || fail "$1=${!1} is no number from $2 on."
}

# TYPE, a slice by the name that Cloud TPU has for it.
check_type() {
  local size="${TYPE##*-}"
  [[ "$TYPE" =~ ^v[0-9a-z]+-[1-9][0-9]{0,5}$ ]] || fail "TYPE=$TYPE: as in v4-64."
  case "$TYPE" in
    v5e-*) fail "TYPE=$TYPE: Cloud TPU names it v5litepod-$size." ;;
    v[234]-* | v5p-*) [ $((size % 8)) -eq 0 ] || fail "TYPE=$TYPE: ${TYPE%-*} has multiples of 8 (TensorCores)." ;;
    v5litepod-* | v6e-*)
      [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] ||
        fail "TYPE=$TYPE: ${TYPE%-*} has 1, 4, 8, 16, 32, 64, 128 or 256 (chips)." ;;
  esac
}

# Behind other arguments --dry-run would go to what is to be run, which then does.
check_dry_run() {
  local argument
  for argument in "$@"; do
    [ "$argument" != --dry-run ] ||
      fail "--dry-run stands before the other arguments: bash $0 ${COMMAND:+$COMMAND }--dry-run ..."
  done
}

# Arguments for another shell to read, each behind a space.
quoted() {
  printf ' %q' "$@"
}

has_accelerator() {
  local device
  for device in /dev/nvidia[0-9]* /dev/accel* /dev/vfio/[0-9]* /dev/kfd /dev/dxg; do
    [ -e "$device" ] && return 0
  done
  return 1
}

# On a CPU, huge pages for malloc make a training step about 1.3 times faster, and JAX need not look for devices.
if ! has_accelerator; then
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
  if [ "$(uname -s)" = Linux ]; then
    case "${GLIBC_TUNABLES:-}" in
      *glibc.malloc.hugetlb=*) ;;
      *) export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1" ;;
    esac
  fi
fi

# Tests run on the CPU; the TPU compiler (libtpu) must not look for a TPU or for the metadata server of a cloud.
use_test_environment() {
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
  export TPU_SKIP_MDS_QUERY="${TPU_SKIP_MDS_QUERY:-1}"
  export TPU_ACCELERATOR_TYPE="${TPU_ACCELERATOR_TYPE:-v4-8}"
  export TPU_WORKER_HOSTNAMES="${TPU_WORKER_HOSTNAMES:-localhost}"
}

check_version() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
}

make_venv() {
  local python="${PYTHON:-python3}"
  command -v "$python" >/dev/null ||
    fail "There is no $python. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11 bash $0"
  check_version "$python" ||
    fail "$python is $("$python" --version 2>&1), but pit_jax needs Python 3.11 or newer." \
      "Install one, or name one: PYTHON=/path/to/python3.11 bash $0"
  echo "Making ${VENV#"$ROOT/"} with $("$python" --version)"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear "$VENV" || fail "Making $VENV failed (see above): is the folder writable?"
  else # Debian keeps ensurepip in a package of its own; pip outside can fill an environment without it
    { "$python" -m venv --clear --without-pip "$VENV" &&
      "$python" -m pip --python "$VENV/bin/python" install --quiet pip; } ||
      fail "Making $VENV failed (see above)." \
        "On Debian and Ubuntu, 'apt install python3-venv' adds what is missing; then start again."
  fi
}

# What an installation depends on. The folder counts, as an editable installation points to it.
install_key() {
  "$VENV/bin/python" - "$ROOT" <<'PYTHON'
import hashlib
import pathlib
import sys

root = pathlib.Path(sys.argv[1])
files = [root / name for name in ("setup.py", "pyproject.toml", "launch/requirements.lock")]
parts = [sys.version.encode(), str(root).encode(), *(path.read_bytes() for path in files)]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

# install [EXTRA]: the package with the tested versions, unless that (or more) has been done and nothing has changed
# since. Extras, each within the next: core, report, test, "test,parity"; others are within none.
install() {
  local extra="${1:-core}" key more wider="test,parity test report core"
  [[ " $wider " == *" $extra "* ]] || wider="$extra"
  "$VENV/bin/python" -c 'import pip' 2>/dev/null || make_venv
  check_version "$VENV/bin/python" ||
    fail "$VENV has $("$VENV/bin/python" --version 2>&1), but pit_jax needs Python 3.11 or newer." \
      "Remove that folder and start again."
  key="$(install_key)"
  for more in $wider; do
    if [ -f "$VENV/.installed-$more" ] && [ "$(cat "$VENV/.installed-$more")" = "$key" ]; then
      return 0
    fi
    [ "$more" != "$extra" ] || break
  done
  echo "Installing pit_jax and what it needs into .venv (once; a few minutes on a slow network)"
  (
    cd "$ROOT" && "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint launch/requirements.lock --editable ".${1:+[$1]}"
  ) || fail "Installing failed (see pip's lines above)." \
    "Network: is the package index within reach? Behind a mirror or proxy set PIP_INDEX_URL or HTTPS_PROXY." \
    "Versions: no matching distribution mostly means a Python that a package has no wheel for; 3.11 is tested" \
    "  (remove .venv, then PYTHON=python3.11 bash $0)." \
    "Disk: .venv needs about 2 GB." \
    "Then start again; what is installed already is kept."
  printf '%s\n' "$key" >"$VENV/.installed-$extra"
}
