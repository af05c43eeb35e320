"""Example plugins for litgpt_whittle in a separate package; see `tutorials/extending.md`."""
