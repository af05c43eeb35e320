"""`litgpt search`: candidates are asked for, scored, written down, told of, and the best are chosen among."""
