"""The projector: the event log folded into read models in MongoDB, each event exactly once."""
