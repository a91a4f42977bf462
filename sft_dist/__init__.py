"""sft-dist: distributed supervised fine-tuning with the same gradient on one CPU and on hundreds of GPUs."""

__version__ = "0.1.0"
