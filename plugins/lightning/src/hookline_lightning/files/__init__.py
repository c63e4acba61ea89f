"""Checkpoints in Lightning's form: who writes them, and how they are written and read."""
