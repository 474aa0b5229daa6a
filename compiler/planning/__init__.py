"""The planner's commands: finding the model, tracing its ops, searching, simulating, measuring this machine. See docs/planner.md."""
