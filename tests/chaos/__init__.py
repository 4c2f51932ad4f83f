"""The service under faults: a workload, a history of all calls, and a checker that shares no code with the service."""
