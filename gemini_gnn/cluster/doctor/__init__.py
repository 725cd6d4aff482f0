"""Examine the machines of a job before it starts: ``launch/doctor.py``.

    examine -> reach -> probe (one per machine, over ssh or srun) -> facts, links, folder, collective
            -> verdicts (pure): facts -> findings -> table

A probe obeys the machine that asks, and ends when that one closes the connection, dies or goes silent: nothing stays.
"""
