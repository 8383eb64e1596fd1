"""The trainer's room: `trainer` is the loop, read it first; docs/architecture.md says what each file is
for."""
