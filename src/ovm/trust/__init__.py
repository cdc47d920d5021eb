"""Checks that no other user or guest could have changed what ovm uses; locks files and writes them atomically."""
