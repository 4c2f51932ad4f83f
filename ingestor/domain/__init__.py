"""The rules. Pure: no I/O, no clock, no randomness; the same command on the same state gives the same events."""
