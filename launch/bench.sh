#!/usr/bin/env bash
# Measures this machine: bash launch/bench.sh [--works=sft_small,gen_small_b16] [--calls=5] [--json=FILE]
#
# Installs into .venv at the first start. Each work has a process of its own, so that none finds memory as another left
# it; --config, --grow and --list are those of `python -m pit_jax.bench`, in one process. Where others use the machine
# meanwhile, the last column of the table says how many cores they took.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

help_if_asked "$@"
install report
cd "$ROOT"
works=""
rest=()
for argument in "$@"; do
  case "$argument" in
    --works=*) works="${argument#*=}" ;;
    --works) fail "--works=NAME,NAME wants an equals sign." ;;
    --config | --config=* | --grow | --grow=* | --list | --nolist) exec "$VENV/bin/python" -m pit_jax.bench "$@" ;;
    *) rest+=("$argument") ;;
  esac
done
works="${works:-$("$VENV/bin/python" -m pit_jax.bench --list)}"
for work in ${works//,/ }; do
  "$VENV/bin/python" -m pit_jax.bench --works="$work" ${rest[@]+"${rest[@]}"}
done
