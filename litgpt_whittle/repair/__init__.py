"""Repair a pruned model in closed form, by least squares: `litgpt extract --repair`."""
