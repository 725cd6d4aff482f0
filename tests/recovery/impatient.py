"""A worker agent that waits a second where others wait ten or more: python -m tests.recovery.impatient ..."""

import functools

from gemini_gnn.recovery.worker import agent, children, decisions

agent.Limits = functools.partial(decisions.Limits, reap_s=1.5, leave_s=1.0)
agent.REAP_ORPHANS_S = 0.5
children.FORK_S = 1.0

if __name__ == "__main__":
    agent.main()
