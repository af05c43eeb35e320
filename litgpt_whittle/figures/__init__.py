"""Figures and their common style."""
