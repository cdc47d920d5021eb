"""Power cuts made real: a disk's writes are logged, and any disk a cut may have left is made from the log."""
