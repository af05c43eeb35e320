"""Code that `litgpt export --format deci` copies next to the weights, so that `trust_remote_code=True` can load them.

It imports nothing from litgpt_whittle, because the readers of the directory need not have it.
"""
