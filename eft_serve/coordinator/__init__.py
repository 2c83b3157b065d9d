"""Many models, no Ray, no engine: requests, the decode loop, and from logits to text."""
