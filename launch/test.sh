#!/usr/bin/env bash
# Runs ruff and the tests: bash launch/test.sh [arguments of pytest]
#
# Installs into .venv at the first start. Paths in arguments count from the repository root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_test_environment
install test
cd "$ROOT"
status=0
"$VENV/bin/python" -m ruff check . || {
  status=$?
  echo "ruff found faults (above): this run fails, whatever the tests say."
}
"$VENV/bin/python" -m pytest -q "$@" || status=$?
exit "$status"
