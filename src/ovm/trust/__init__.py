"""Decides whether what another user, or a guest, could have made is used; and locks files, and writes them whole."""
