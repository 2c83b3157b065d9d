"""Work that runs against a served application: batch inference."""
