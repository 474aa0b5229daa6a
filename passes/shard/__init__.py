"""Auto-parallelism: see docs/planner.md. Public names are re-exported here."""
