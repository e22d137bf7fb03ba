"""The system as a library: what `import clipreid` offers to a program, in one process and without Ray or DeepSpeed."""

from cluster.library.pixels import list_images
from cluster.library.reid import ReID, load

__all__ = ["ReID", "list_images", "load"]
