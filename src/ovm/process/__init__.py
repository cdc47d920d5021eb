"""Processes, their locks and logs; independent of virtual machines."""
