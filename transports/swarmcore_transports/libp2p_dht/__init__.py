"""The registry over libp2p's Kademlia DHT."""
