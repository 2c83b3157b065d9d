"""From several models' logits to a token: pure functions of tensors."""
