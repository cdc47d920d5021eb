"""What is said to a running guest, and what it is given at boot."""
