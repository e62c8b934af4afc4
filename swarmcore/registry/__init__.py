"""Who serves what in a swarm: the abstract class of registries, gossip, and one in memory."""
