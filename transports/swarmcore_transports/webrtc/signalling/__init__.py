"""Signalling: how two peers exchange offers, answers and candidates before they are connected."""
