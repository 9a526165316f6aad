"""The message in words."""

import os
from collections.abc import Iterable
from pathlib import Path

from megafusion.resilience.watchdog.heartbeat import Heartbeat

# "Try again later" in sysexits.h: what a launcher or a queue may start anew.
EXIT_STATUS = os.EX_TEMPFAIL


def report(reason: str, last_heartbeats: dict[int, Heartbeat | None], silent: list[int], folder: Path) -> str:
    """The message: the reason, then who does not answer, who waits where, and who does not wait.

    heard: each rank's last heartbeat. silent: ranks that do not answer. folder: where the stacks are.
    """
    answering = [heartbeat for rank, heartbeat in last_heartbeats.items() if heartbeat and rank not in silent]
    all_there = len(answering) == len(last_heartbeats) and not any(heartbeat.end for heartbeat in answering)
    is_waited_for = all_there and any(heartbeat.collective for heartbeat in answering)
    places: dict[str, list[int]] = {}
    for rank, heartbeat in last_heartbeats.items():
        if heartbeat is None:
            text = "no heartbeat: killed, stopped or cut off"
        elif rank in silent:
            state = heartbeat.process_state()
            text = f"its process is {state}" if state else "no heartbeat: killed, stopped or cut off"
            text += f"; last seen at {place_in_words(heartbeat)}"
        elif heartbeat.end:
            text = f"has ended: {heartbeat.end}"
        else:
            text = place_in_words(heartbeat)
            if is_waited_for and not heartbeat.collective:
                text = f"in no collective while others wait, so look there first: {text}"
        places.setdefault(text, []).append(rank)
    lines = [f"megafusion: {reason}. Every process ends with exit status {EXIT_STATUS}."]
    lines += [f"  {ranks_in_words(ranks)}: {text}" for text, ranks in places.items()]
    return "\n".join([*lines, f"  stacks: {folder}/rank-*.txt", ""])


def place_in_words(heartbeat: Heartbeat) -> str:
    """Where a rank is."""
    at = f"step {heartbeat.step}, {heartbeat.phase}, "
    if heartbeat.collective:
        at += f"in {heartbeat.collective} called from {heartbeat.where}"
    else:
        at += f"at {heartbeat.where}" + (f" (in {heartbeat.inside})" if heartbeat.inside else "")
    return at + (f", which raised {heartbeat.raised}" if heartbeat.raised else "")


def ranks_in_words(ranks: Iterable[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {text}"
