"""Where jobs are kept: one interface, in memory for unit tests and in a SQL database for everything else."""
