"""What a student learns from its teacher, and how the teacher tells it, live or from a cache."""
