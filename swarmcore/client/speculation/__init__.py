"""Tokens guessed ahead of the model, which verifies several of them in one step."""
