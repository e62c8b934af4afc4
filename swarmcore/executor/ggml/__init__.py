"""Blocks computed by llama.cpp on the weights of a GGUF as they are."""
