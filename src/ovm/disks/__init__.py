"""The files a machine is made of: which must be made anew, and how they get there whole."""
