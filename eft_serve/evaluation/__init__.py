"""Whether the claims of emulated fine-tuning hold on the embedded families: figures, their intervals, one page."""
