"""What goes over a stream: message framing, tensors and their codecs, the records of each protocol."""
