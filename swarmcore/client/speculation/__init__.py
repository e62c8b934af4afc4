"""Tokens guessed ahead of the model, which verifies several of them in one step.

Who guesses is a `drafter.Drafter` for each sequence, made by a `drafter.DraftSource`. A generation uses it
through a `guarded.GuardedSource`, and one or several of them as a `drafting.Drafting`.
"""
