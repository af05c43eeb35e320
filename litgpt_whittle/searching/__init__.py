"""`litgpt search`: propose, evaluate, record and report candidates, and select the best."""
