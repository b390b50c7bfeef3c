#!/usr/bin/env bash
# Trains the synthetic task from nothing: bash launch/demo.sh [--config.field=value ...]
#
# Installs into .venv at the first start. Further arguments go to pit_jax.train; paths count from the repository root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install report
cd "$ROOT"
exec "$VENV/bin/python" -m pit_jax.train --config=configs/pit_synthetic.py --workdir=runs/demo "$@"
