"""A module's run: what adapts it, what it hears, what it may do in the run's place, and what it sees of the trainer."""
