"""A caption processor: a plain function, whose keyword-only parameters are its options."""

from typing import Any

from sdxl_train import ImageInfo


def shuffle_tags(img_info: ImageInfo, *, keep: int = 1, separator: str = ", ", **kwargs: Any) -> str:
    """Shuffle the tags of a caption at every fetch.

    Args:
        keep: tags at the beginning that stay where they are; 0 shuffles all.
        separator: what stands between two tags.
        kwargs: the other arguments of the hook; `random` is a `random.Random` of this fetch.
    """
    tags = [tag.strip() for tag in (img_info.caption or "").split(separator.strip())]
    kept, shuffled = tags[:keep], tags[keep:]
    kwargs["random"].shuffle(shuffled)
    return separator.join(kept + shuffled)
