"""The client: a swarm that it has joined, sessions and batches through servers, models and texts."""
