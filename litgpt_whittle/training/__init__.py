"""The training loop and its parts: checks, memory plan, sharding, resuming, metrics."""
