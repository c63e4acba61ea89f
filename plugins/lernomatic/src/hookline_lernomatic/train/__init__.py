"""Trainers and schedules."""
