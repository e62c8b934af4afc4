"""A swarmcore transport over Unix-domain sockets: addresses are ``unix:///path/of/socket/<peer id>``."""

from swarmcore_unix.transport import UnixTransport

__all__ = ["UnixTransport"]
