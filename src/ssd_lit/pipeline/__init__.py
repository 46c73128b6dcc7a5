"""One function for each command, and what the workflow asks while it plans."""
