"""Dead letters, commands that could not be read: ``python -m shared.deadletters list | show | replay | drop``.

`shared.deadletters.letters` is what the topic says, `shared.deadletters.replay` puts a command back exactly once.
"""
