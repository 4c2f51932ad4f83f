"""A model of the log-fenced single writer: a broker that may misbehave, writers that stall and crash, and the rules."""
