"""One machine: how it is prepared, booted, paused, suspended, watched and ended."""
