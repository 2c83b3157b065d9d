"""What a model directory holds: one reader for each fact, for every process; judges no configuration, knows no request.

Nothing is ever downloaded and no code of a checkpoint is ever run. Only `model.py` imports torch, and a tokenizer is
built by `transformers` on demand, so that a linter can read the rest without either.
"""
