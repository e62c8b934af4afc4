"""A swarmcore registry in a folder that all peers share."""

from swarmcore_folder.registry import FolderRegistry, folder_registry

__all__ = ["FolderRegistry", "folder_registry"]
