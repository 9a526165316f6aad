"""Watchdog: shuts down a run that hangs or has lost a rank, on every rank, in bounded time, with one message.

A thread on each rank (thread.py) writes a heartbeat (heartbeat.py) into the job's store every few seconds and
reads rank 0's; rank 0 reads them all (peers.py). The first rank with a reason to shut down writes it to the
store; every rank dumps its stacks and exits with RETRY, and one prints which rank is where (shutdown.py). If
rank 0, which hosts the store, is lost, the ranks find one another by the dumped stacks.
"""
