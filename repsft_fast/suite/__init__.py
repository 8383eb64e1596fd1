"""The evaluation suite: from settings to tasks, an engine for a model, replies, verdicts and results; what a
run and `repsft eval` share."""
