"""Jobs that run against a served application: batch inference."""
