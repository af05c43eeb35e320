"""Checkpoints as Hugging Face directories: `litgpt export`."""
