"""Decides whether what another user, or a guest, could have made is used: directories, files and sockets."""
