"""Communication with a running guest, and the configuration it gets at boot."""
