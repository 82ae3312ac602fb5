"""Rules that give every coordinate a factor, one a file."""
