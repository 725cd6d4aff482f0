"""Machines and ranks as ``status.json`` shows them (``observe.status``). Pure; times on the root's clock become ages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemini_gnn.recovery.board import Board
from gemini_gnn.recovery.messages import Beat, Member
from gemini_gnn.recovery.root.state import State


def machines(
    state: State,
    heard_s: Mapping[int, float],
    beats: Mapping[int, Beat],
    members: Mapping[int, Member],
    now: float,
) -> list[dict[str, Any]]:
    """
    Args:
        heard_s: by number of a machine that is connected, when it was heard last. beats: its last one.
        members: by number, where it answers.
    """
    return [
        {
            "machine": one.name or None,
            "ranks": sorted(state.ranks_of(number)),
            "root": number == state.root,
            "here": one.here,
            "ready": one.ready,
            "here_s": round(now - one.since_s, 3) if one.name else None,
            "silent_s": round(now - heard_s[number], 3) if number in heard_s else None,
            "memory_bytes": beats[number].memory_bytes if number in beats else None,
            "address": members[number].address if number in members else None,
            "port": members[number].port if number in members else None,
        }
        for number, one in enumerate(state.machines)
    ]


def ranks(state: State, boards: Mapping[int, Board], now: float) -> list[dict[str, Any]]:
    """Of the newest generation; of a rank whose trainer has not been heard of, what is known."""
    found = []
    for rank in range(state.world):
        one: dict[str, Any] = {
            "rank": rank,
            "machine": state.name(state.machine_of(rank)),
            "alive": rank in state.alive,
        }
        board = boards.get(rank)
        if board is not None:
            one |= {"step": board.step, "phase": board.phase.word, "phase_s": round(now - board.since_s, 3)}
        if board is not None and board.snapshot is not None:
            one["snapshot"] = list(board.snapshot[:3])
            one["snapshot_s"] = round(now - board.snapshot.when_s, 3)
        found.append(one)
    return found
