"""What a trained model or a corpus looks like, for people: pictures and tables. Each report is one module."""
