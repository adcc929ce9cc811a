"""Pretrain GPT-2 from scratch on the Hugging Face libraries."""

__version__ = "0.1.0"
