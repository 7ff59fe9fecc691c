#!/bin/bash
# Run a command in N processes, by MindSpore's msrun, and wait for them. `-h` shows all forms; docs/launch.md explains.
#
#   scripts/msrun_launcher.sh "run_llm.py --config FILE --use_parallel True" N
#
# PYTHON names the interpreter.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python}" -m llm_core.launch "$@"
