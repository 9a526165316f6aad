"""Text of the watchdog's message."""

from collections.abc import Iterable
from pathlib import Path

from megafusion.resilience.exit_status import ExitStatus
from megafusion.resilience.watchdog.heartbeat import Heartbeat


def format_report(
    reason: str, last_heartbeats: dict[int, Heartbeat | None], silent: list[int], folder: Path
) -> str:
    """The reason, then for each rank where it is: silent, ended, waiting in a collective, or outside of one.

    silent: ranks that do not answer. folder: of the stacks.
    """
    answering = [heartbeat for rank, heartbeat in last_heartbeats.items() if heartbeat and rank not in silent]
    all_run = len(answering) == len(last_heartbeats) and not any(heartbeat.end for heartbeat in answering)
    any_waits = all_run and any(heartbeat.collective for heartbeat in answering)
    states: dict[str, list[int]] = {}
    for rank, heartbeat in last_heartbeats.items():
        if heartbeat is None:
            text = "no heartbeat: killed, stopped or disconnected"
        elif rank in silent:
            state = heartbeat.process_state()
            text = f"its process is {state}" if state else "no heartbeat: killed, stopped or disconnected"
            text += f"; last seen at {format_location(heartbeat)}"
        elif heartbeat.end:
            text = f"has ended: {heartbeat.end}"
        else:
            text = format_location(heartbeat)
            if any_waits and not heartbeat.collective:
                text = f"in no collective while others wait, so look there first: {text}"
        states.setdefault(text, []).append(rank)
    lines = [f"megafusion: {reason}. Every process exits with status {ExitStatus.RETRY}."]
    lines += [f"  {format_ranks(ranks)}: {text}" for text, ranks in states.items()]
    return "\n".join([*lines, f"  stacks: {folder}/rank-*.txt", ""])


def format_location(heartbeat: Heartbeat) -> str:
    """Step, phase and position in the code of a rank."""
    text = f"step {heartbeat.step}, {heartbeat.phase}, "
    if heartbeat.collective:
        text += f"in {heartbeat.collective} called from {heartbeat.where}"
    else:
        text += f"at {heartbeat.where}" + (f" (in {heartbeat.inside})" if heartbeat.inside else "")
    return text + (f", which raised {heartbeat.raised}" if heartbeat.raised else "")


def format_ranks(ranks: Iterable[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {text}"
