"""Reads model directories: one reader for each fact, used by every process. Knows no configuration and no request.

Nothing is downloaded and no code of a checkpoint is run. Only `model.py` imports torch, and `transformers` is imported
on demand for tokenizers, so that `config check` needs neither for the rest.
"""
