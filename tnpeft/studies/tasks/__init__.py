"""Tasks: their data, their prompts and their scores."""
