"""Features in addition to the pipeline from a teacher to a smaller student."""
