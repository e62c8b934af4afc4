"""A server of this process under random and mutated input, over its real transport: ``make fuzz``.

Whatever comes, the server may refuse it; it may not fail, hang, or keep anything of it.
"""
