"""The files of a machine: deciding which to replace, and replacing them atomically."""
