"""What keeps a run going: bad steps left out by all ranks, signals, crash loops, self-test, speeds, status.

A hang or a lost rank is the watchdog's (megafusion/watch).
"""
