"""The networks to examine, the attacks on them, and the command that trains them (`python -m models.train`)."""
