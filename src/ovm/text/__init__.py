"""Makes untrusted text printable, and removes secrets from text."""
