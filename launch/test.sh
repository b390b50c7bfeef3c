#!/usr/bin/env bash
# Runs ruff and the tests: bash launch/test.sh [--parity] [arguments of pytest]
#
# Installs into .venv at the first start; with --parity also torch and transformers, without which the tests that need
# them are skipped. Without arguments of pytest two processes share the files of tests.
# Paths in arguments count from the repository root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_test_environment
extra=test
if [ "${1:-}" = --parity ]; then
  extra=test,parity
  shift
fi
install "$extra"
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
cd "$ROOT"
status=0
"$VENV/bin/python" -m ruff check . || {
  status=$?
  echo "ruff found faults (above): this run fails, whatever the tests say."
}
"$VENV/bin/python" -m pytest -q "$@" || status=$?
exit "$status"
