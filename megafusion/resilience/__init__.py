"""Failure handling: skipped steps, rollback, stop signals, attempts and crash loops, self-test, watchdog."""
