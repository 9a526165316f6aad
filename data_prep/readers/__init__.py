"""Readers of input formats: each lists the records of a file and reads any of them by its location."""
