"""One inference session through a chain of servers: its stages, its steps, failover and moves."""
