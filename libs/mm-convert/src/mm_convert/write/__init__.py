"""Writing: which files a target will hold, and how it appears whole."""
