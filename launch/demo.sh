#!/usr/bin/env bash
# Trains the synthetic task from nothing: bash launch/demo.sh [--dry-run] [--config.field=value ...]
#
# Installs into .venv at the first start. Further arguments go to pit_jax.train; paths count from the repository root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

help_if_asked "$@"
[ "${1:-}" = --dry-run ] && { DRY_RUN=1; shift; }
check_dry_run "$@"
command=("$VENV/bin/python" -m pit_jax.train --config=configs/pit_synthetic.py --workdir=runs/demo "$@")
if [ -n "${DRY_RUN:-}" ]; then
  call "${command[@]}"
else
  install report
  cd "$ROOT"
  exec "${command[@]}"
fi
