"""Ways out of this package and into it: Hugging Face folders, and other projects' checkpoints."""
