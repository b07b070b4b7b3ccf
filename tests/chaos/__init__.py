"""Faults under load, by a seeded schedule, and the books afterwards. `python -m tests.chaos --help`."""
