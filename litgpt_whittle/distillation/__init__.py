"""Distillation: losses, and the teacher's predictions, computed live or read from a cache."""
