"""What the performance figures in README.md come from; each program runs alone and prints a table."""
