"""What a user would otherwise put together for this job, a page each, and the course that all of them run."""
