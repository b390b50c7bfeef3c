#!/usr/bin/env bash
# Compares with other libraries on the processors of this machine: bash launch/peers.sh [--works=sft_small,ppo_tiny_e4]
#
# transformers, TRL and Tunix do the same works as this package (pit_jax/works.py), all of them in turn, each time in a
# process of its own; the medians over all rounds are a table, units per second:
#
#   --works=...   by default sft_small,sft_tiny,dpo_small,rm_small,ppo_tiny_e4,gen_small_b16,gen_small_b64,gen_tiny_b16;
#                 there are also ppo_tiny_e1 and gen_tiny_b64
#   --rounds=3    in which each has a turn
#   --calls=5     that count, of each turn
#   --seconds=600 that a turn may take
#   --json=FILE   a line per turn is added, with seconds of each call, versions and limits; what is there of the same
#                 processor, calls and (ours) commit is not run again, so that a run goes on where it was interrupted
#   --stock       without the settings that make all of them faster, which are: huge pages for malloc, and on processors
#                 of AMD the AVX-512 path of MKL for torch (needs a C compiler)
#   --dry-run     prints what would run
#
# Installs into .venv and .peers at the first start (3 GB; PIT_JAX_PEERS names another folder). Paths count from the
# repository root. A library that fails is a line that says why.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

help_if_asked "$@"
cd "$ROOT"
FOLDER="${PIT_JAX_PEERS:-.peers}"
[[ "$FOLDER" = /* ]] || FOLDER="$ROOT/$FOLDER"
PIP=(-m pip install --quiet --disable-pip-version-check)
stock=
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    --stock) stock=1 ;;
    --folder* | --python* | --avx512*) fail "There is no $argument; --help says what there is." ;;
  esac
done
[[ -n "$stock" || "$FOLDER" != *[[:space:]:]* ]] ||
  fail "$FOLDER has a space or a colon, at which LD_PRELOAD would be cut: PIT_JAX_PEERS=/another/folder bash $0"
python="${PYTHON:-python3}" # as there may be none of ours yet
check_version "$python" 2>/dev/null || python="$VENV/bin/python"
command -v "$python" >/dev/null || fail "There is no Python 3.11 or newer: PYTHON=/path/to/python3.11 bash $0"
"$python" launch/peers/compare.py --check "$@" || exit 2

# environment NAME: FOLDER/venv-NAME with the versions of peers/NAME.txt, unless that has been done.
environment() {
  local VENV="$FOLDER/venv-$1" pinned="$ROOT/launch/peers/$1.txt" stamp="$FOLDER/$1.installed"
  ! cmp -s "$pinned" "$stamp" || return 0
  if [ -n "${DRY_RUN:-}" ]; then
    call "${PYTHON:-python3}" -m venv --clear "$VENV"
  else
    make_venv
  fi
  # torch for processors has an index of its own; what PyPI has brings gigabytes of CUDA, and does the same.
  [ "$1" != torch ] ||
    call "$VENV/bin/python" "${PIP[@]}" --retries 1 --no-deps --index-url https://download.pytorch.org/whl/cpu \
      "$(grep ^torch== "$pinned")" || echo "That index is out of reach: torch comes from where the others do." >&2
  call "$VENV/bin/python" "${PIP[@]}" --requirement "$pinned" || return
  # The last TRL with PPO stands beside the newest.
  [ "$1" != torch ] ||
    call "$VENV/bin/python" "${PIP[@]}" --upgrade --no-deps --target "$FOLDER/trl-1.12" trl==1.12.0 || return
  [ -n "${DRY_RUN:-}" ] || cp "$pinned" "$stamp"
}

# What makes MKL take its AVX-512 path on processors of AMD that have one: LIBRARY is to be preloaded.
find_avx512() {
  local compiler cpu="${CPUINFO:-/proc/cpuinfo}"
  { [ -r "$cpu" ] && grep -q AuthenticAMD "$cpu" && grep -qw avx512f "$cpu"; } || return 0
  for compiler in "${CC:-}" cc gcc clang; do
    if [ -n "$compiler" ] && command -v "$compiler" >/dev/null; then
      call "$compiler" -shared -fPIC -o "$FOLDER/avx512.so" "$ROOT/launch/peers/avx512.c" || continue
      LIBRARY="$FOLDER/avx512.so"
      return
    fi
  done
  echo "There is no C compiler that works (CC, cc, gcc, clang): torch goes on with MKL's AVX2 path, with which this" \
    "processor of AMD is slower. Install one, and start again." >&2
}

if [ -z "${DRY_RUN:-}" ]; then
  mkdir -p "$FOLDER"
  install report
fi
for name in torch jax; do
  environment "$name" ||
    echo "Installing what venv-$name needs failed (see above): its libraries will be lines that say so. Is the package" \
      "index within reach? The next start tries again." >&2
done
LIBRARY=""
[ -n "$stock" ] || find_avx512
if [ -z "$stock" ] && grep -qs '\[never\]' /sys/kernel/mm/transparent_hugepage/enabled; then
  echo "Huge pages are off on this machine (/sys/kernel/mm/transparent_hugepage/enabled): all go on without." >&2
fi
call rm -f "$FOLDER/works.jsonl"
call "$VENV/bin/python" -m pit_jax.bench --list --json="$FOLDER/works.jsonl"
[ -n "${DRY_RUN:-}" ] || python="$VENV/bin/python"
exec "$python" launch/peers/compare.py --folder="$FOLDER" --python="$VENV/bin/python" --avx512="$LIBRARY" "$@"
