"""Features besides the road from a teacher to a smaller student."""
