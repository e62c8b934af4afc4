"""Generation servers: peers that make texts for clients without torch."""
