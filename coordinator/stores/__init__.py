"""Where the registry remembers: in memory for tests and trials, in SQL to last."""
