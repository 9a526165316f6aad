"""Ends a run that hangs or has lost a rank: every process, in bounded time, with a message that names both.

Each rank's thread (watchdog.py) writes a heartbeat (heartbeat.py) into the job's store every few seconds and
reads rank 0's; rank 0 reads all (others.py). Whoever finds a reason to end writes it there as the verdict;
every rank writes its stacks and ends with status 75, and one prints who is where (ending.py, report.py).
Where rank 0, which keeps the store, is lost, the written stacks tell that.
"""
