"""The step contract on ZeroMQ."""
