"""One running machine behind a socket: a process of its own that holds it, and those who talk to it."""
