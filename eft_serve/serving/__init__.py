"""Joins coordinator and transport without Ray: a coordinator's server, and the client that an ingress uses."""
