"""The whole system on a simulated clock and network: thousands of peers in one process, no torch, no threads.

Servers, clients, sessions, routing, registry and placement are the real code. Simulated are the clock
(`swarmcore.testing.clock`), the network (`swarmcore.sim.network`) and the model (`swarmcore.sim.executor`),
which takes the time that a real one was measured to take and computes something that tells when a token was
wrong. With one seed a run repeats itself to the byte.
"""
