"""Streams of whole messages over any byte pipe that reports itself like an asyncio transport.

What backends share: frames, credit, signs of life, orderly ends, and the reuse of idle connections. A backend
makes pipes, proves who is at their other end, and hands them over as a `Connection`'s transport.
"""
