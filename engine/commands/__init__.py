"""The commands of `python -m engine`, one a file."""
