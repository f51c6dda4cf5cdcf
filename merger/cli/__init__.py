"""The `merger` command: one file a verb."""
