"""Processes and the files they hold; knows nothing of virtual machines."""
