"""What decides and remembers: rounds, cohorts, the update gate, the registry."""
