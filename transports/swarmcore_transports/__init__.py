"""Transport backends shipped with swarmcore, found through the entry-point group ``swarmcore.transports``."""
