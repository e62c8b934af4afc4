"""Plain objects that hold the state of an inference session, on the client and on each server."""
