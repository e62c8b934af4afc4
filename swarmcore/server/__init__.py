"""A block server: loads blocks, announces them, and serves sessions, forward and backward passes."""
