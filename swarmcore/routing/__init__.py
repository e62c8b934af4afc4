"""Plain objects that choose the servers a session passes through."""
