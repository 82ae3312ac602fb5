"""Rules that move a worker's weights before it computes its gradient, one a file."""
