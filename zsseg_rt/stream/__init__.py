"""Streams: frames from cameras, videos and photos, on their way to labels and files.

Each source has a thread of its own that puts frames into a slot (``capture``, ``hand_off``); the
caller's thread takes them in turns and labels them (``runner``); each sink writes in a thread of
its own (``sinks``). Nothing here knows an engine: the runner is handed a function that labels.
"""
