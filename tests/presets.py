"""All recipes that have a name of their own, and some that are made by a rule; what `test_presets.py` holds every one to."""

from narrowkv import recipe_names

PRESETS = [
    *recipe_names(),
    *("narrow2.5", "narrow3-postrope", "narrow3-equal", "narrow-k4-v2", "nuq3-0.5%", "nuq3-1%-postrope", "kivi-2-g16-r40"),
]
