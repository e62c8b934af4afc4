"""What runs on a server between its sessions and its executor: scheduling, attention cache, batches."""
