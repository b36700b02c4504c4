"""Checkpoints of any project: where their files are, what is read from them, and their parameters by our names."""
