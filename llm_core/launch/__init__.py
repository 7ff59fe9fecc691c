"""Starting several ranks: MindFormers' msrun_launcher.sh, whose engine is MindSpore's msrun.

arguments.py and slurm.py say what is wanted, checks.py whether it can be, gate.py lets the machines meet, group.py
starts msrun and watches over its workers, each of which runs inside worker.py; failure.py tells what went wrong.
"""
