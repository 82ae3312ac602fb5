"""Rules that give workers weights, one a file."""
