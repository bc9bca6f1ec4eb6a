"""Pictures and prompts by one name."""

from vaelab.data.images import Images, load_images, load_pair, same_pictures, short_name

__all__ = ["Images", "load_images", "load_pair", "same_pictures", "short_name"]
