"""What is timed: whole trainers, their parts, their costs; `gpu` holds the parts of a GPU session."""
