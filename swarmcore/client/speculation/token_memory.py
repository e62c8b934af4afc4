"""How much memory the texts that are searched for drafts may take, of one owner and of all together."""

from __future__ import annotations

from collections import Counter

PROCESS_BYTES = 128 * 2**20
OWNER_BYTES = 32 * 2**20


class TokenMemory:
    """Counts bytes by owner. A plain object; one for each process is `shared_memory`."""

    def __init__(self, limit: int = PROCESS_BYTES, owner_limit: int = OWNER_BYTES) -> None:
        self.limit = limit
        self.owner_limit = owner_limit
        self.used = 0
        self._of: Counter[str] = Counter()
        self.refused = 0
        """How often there was no room."""

    def __repr__(self) -> str:
        return f"<TokenMemory {self.used} of {self.limit} bytes · {len(self._of)} owners>"

    def of(self, owner: str) -> int:
        """Bytes that are held for ``owner``."""
        return self._of[owner]

    def take(self, owner: str, size: int) -> bool:
        """Hold ``size`` bytes more for ``owner``, unless that is more than it or all together may have."""
        if self.used + size > self.limit or self._of[owner] + size > self.owner_limit:
            self.refused += 1
            return False
        self.used += size
        self._of[owner] += size
        return True

    def give_back(self, owner: str, size: int) -> None:
        """Hold ``size`` bytes less for ``owner``."""
        self.used -= size
        self._of[owner] -= size
        if not self._of[owner]:
            del self._of[owner]


shared_memory = TokenMemory()
