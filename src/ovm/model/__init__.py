"""The vocabulary: data, and the checks of it; no processes, no sockets."""
