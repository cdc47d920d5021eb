"""The builder of guest images; a program of its own."""
