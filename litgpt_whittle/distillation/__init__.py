"""Distillation: losses, and the teacher's outputs, live or from a cache."""
