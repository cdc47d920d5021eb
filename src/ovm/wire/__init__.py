"""Bytes on a socket and what they mean; knows nothing of virtual machines."""
