"""What a suite measures, each stage once."""
