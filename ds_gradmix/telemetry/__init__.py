"""What is measured of workers, and what is made of it: numbers, alarms, and lines in a file."""
