"""HTTP in, commands out to Kafka, answers back; reads from MongoDB. Any number of these may run side by side."""
