"""The files of a machine: which must be recreated, and how they are written atomically."""
