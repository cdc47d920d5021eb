"""A machine's service: the process that owns the running machine, its socket and its clients."""
