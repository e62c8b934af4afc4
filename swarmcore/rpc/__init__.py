"""Calls and two-way channels of typed records between peers, over any transport."""
