"""The fused head and its exact counts inside other people's trainers."""
