"""Transport backends shipped with swarmcore; each is found through the entry-point group ``swarmcore.transports``."""
