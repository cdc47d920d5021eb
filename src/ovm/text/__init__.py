"""Makes text that somebody else chose fit to print, and takes credentials out of it."""
