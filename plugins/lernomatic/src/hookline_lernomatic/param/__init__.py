"""The search of parameters."""
