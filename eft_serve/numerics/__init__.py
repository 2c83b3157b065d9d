"""Pure torch: from several models' logits to a token."""
