"""The whole stack on one machine, without Docker: the real Kafka, the real MongoDB, and the three processes."""
