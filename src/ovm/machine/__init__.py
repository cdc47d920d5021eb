"""One machine: prepare, boot, pause, suspend, watch and stop it."""
