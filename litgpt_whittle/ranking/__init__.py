"""What a teacher's units are worth, and the order that follows from it: `litgpt rank`."""
