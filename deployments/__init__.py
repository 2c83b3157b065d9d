"""Importable Serve applications, and one YAML for each setting."""
