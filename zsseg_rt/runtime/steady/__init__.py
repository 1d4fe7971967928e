"""What past frames tell about the next one: labels that flicker less, still frames not run again.

``motion`` compares small pictures of two frames and finds where each cell was; ``memory``
keeps what one source's frames left behind. It belongs to a source, not to a lane: a lane is handed
the memory together with the frame.
"""
