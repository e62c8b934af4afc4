"""The registry by gossip: members that tell each other signed records and notice deaths (after SWIM)."""
