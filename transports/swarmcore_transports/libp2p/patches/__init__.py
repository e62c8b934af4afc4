"""What repairs py-libp2p, and nothing else: each class and function says what is wrong without it.

All of it was checked with the versions in `CHECKED`. tests/transports/libp2p/patches/test_upstream_faults.py
shows each fault in the installed library as it comes: once that does without a repair, the test fails and
says so.
"""

CHECKED = (">=0.8.1", "<0.9")
"""Versions of libp2p that the repairs were checked with."""
