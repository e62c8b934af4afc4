"""Circuit relay version 2: its client and its service."""
