"""eft-serve: emulated fine-tuning (arXiv 2310.12962) as a service on Ray Serve and DeepSpeed."""

__version__ = "0.1.0"
