"""Peers behind routers: AutoNAT, UPnP port mappings, and hole punching (DCUtR)."""
