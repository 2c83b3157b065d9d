"""Many models, no Ray, no engine: requests, the decode loop and everything between logits and text."""
