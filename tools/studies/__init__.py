"""Our own studies: the small CLIP, the demo's maker, systems compared; not in the wheel."""
