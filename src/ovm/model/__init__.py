"""Data types and their validation; no processes, no sockets."""
