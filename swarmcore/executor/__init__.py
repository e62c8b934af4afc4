"""What computes blocks: the abstract classes of executors, and the torch back end."""
