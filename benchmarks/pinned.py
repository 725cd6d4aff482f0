"""`pinned.py SCRIPT ARGUMENTS`: run a script on one core, with all its threads.

It is the LOCAL_RANK-th of those allowed, from the FIRST_CORE-th on.
"""

import os
import runpy
import sys

cores = sorted(os.sched_getaffinity(0))
number = int(os.environ.get("FIRST_CORE", "0")) + int(os.environ.get("LOCAL_RANK", "0"))
os.sched_setaffinity(0, {cores[number % len(cores)]})
sys.argv = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # the launcher puts it in front of SCRIPT
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
