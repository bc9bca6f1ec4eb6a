"""Load pictures and prompts by name."""

from vaelab.data.images import Images, load_images, load_pair, shared_pictures, short_name

__all__ = ["Images", "load_images", "load_pair", "shared_pictures", "short_name"]
