"""The step contract on ZeroMQ: one message for each model and step; knows neither models nor requests."""
