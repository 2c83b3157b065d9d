"""ONE model, no Ray: sequences, the KV cache and the forward."""
