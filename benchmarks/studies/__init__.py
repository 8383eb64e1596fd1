"""Training runs that answer a question: one record per cell, resumable."""
