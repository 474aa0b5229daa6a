"""Running a plan: from a model and a plan to this rank's compiled, sharded program. See docs/distributed.md."""
