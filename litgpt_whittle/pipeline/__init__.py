"""`litgpt whittle`: a pipeline whose stages are the other commands."""
