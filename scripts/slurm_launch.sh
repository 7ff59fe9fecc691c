#!/bin/bash
# The task of one node of a Slurm step: runs its share of a group of processes. Within a job of several nodes:
#
#   srun --ntasks-per-node=1 scripts/slurm_launch.sh "run_llm.py --config FILE --use_parallel True" LOCAL_N
#
# Nodes and their addresses are srun's to tell. docs/launch.md has a whole job script; PYTHON names the interpreter.

exec bash "$(dirname "${BASH_SOURCE[0]}")/msrun_launcher.sh" --slurm "$@"
