"""A worker agent that waits a second where others wait ten or more: python -m tests.recovery.impatient ..."""

import functools
import os
from dataclasses import replace
from pathlib import Path

from gemini_gnn.observe import terms
from gemini_gnn.recovery.worker import agent, beginning, children, decisions, out_of_memory

agent.Limits = functools.partial(decisions.Limits, reap_s=1.5)
beginning.ROOT_LIMITS = replace(beginning.ROOT_LIMITS, leave_s=1.0)
agent.REAP_ORPHANS_S = 0.5
terms.claim_term = functools.partial(terms.claim_term, beat_s=0.1)
children.FORK_S = 1.0
if "CGROUP" in os.environ:
    out_of_memory.own_cgroup = lambda: Path(os.environ["CGROUP"])

if __name__ == "__main__":
    agent.main()
