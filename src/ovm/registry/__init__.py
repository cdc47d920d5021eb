"""The named machines of this host: their settings, records and images."""
