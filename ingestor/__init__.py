"""Turns commands into events: one log-fenced writer per partition."""
