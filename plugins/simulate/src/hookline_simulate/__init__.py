"""Simulate a step of a run as one rank of many: what it holds in memory and what it sends, without their devices."""

__version__ = "0.1.0"
