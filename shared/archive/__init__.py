"""Backup and restore of the event log: ``python -m shared.archive export | check | import``.

`shared.archive.files` describes the format, `export` writes it from Kafka, `restore` brings it into an empty Kafka.
"""
