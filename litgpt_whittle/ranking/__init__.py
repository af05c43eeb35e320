"""Importance scores of a teacher's units and layers, and the order that follows from them: `litgpt rank`."""
