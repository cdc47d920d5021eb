"""HTTP and JSON over unix sockets; independent of virtual machines."""
