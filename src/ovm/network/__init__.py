"""The guest's network: gvproxy."""
