"""Plain objects that choose which blocks a server holds, how many, and when it should move."""
