"""The one training loop and all that it stands on: checks, memory plan, sharding, resuming, figures."""
